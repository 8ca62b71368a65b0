"""What the pieces of a streamed step need on the device, found out by compiling them without allocating anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from stackwise_jax.curriculum import Phase
from stackwise_jax.engine import pieces
from stackwise_jax.engine.dryrun import abstract_step
from stackwise_jax.engine.holdings import Part
from stackwise_jax.engine.optimizer import make_optimizer
from stackwise_jax.engine.programs import StepPrograms, bare, compiled_bytes
from stackwise_jax.engine.resident import step_spec
from stackwise_jax.engine.setup import Setup
from stackwise_jax.engine.streamed import as_learning
from stackwise_jax.engine.weights import Weights
from stackwise_jax.engine.window import Window

Tree = Any


def piece_bytes(setup: Setup, weights: Weights, phase: Phase, programs: StepPrograms) -> dict[str, dict[str, int]]:
    """`programs.compiled_bytes` of each piece of a step of the phase; of several programs of a piece the largest.

    Keys: open_step, forward, backward, head_gradient, update, and where they are used embed_gradient, note,
    pull_gradient. The bytes are those of a microbatch on one device: arguments, outputs that reuse none, temporaries.
    """
    found: dict[str, dict[str, int]] = {}

    def compile_piece(function: Callable, static: tuple, *args: Tree, **how: Any) -> None:
        entry = compiled_bytes(programs.program(function, static, *args, **how))
        name = function.__name__
        if name not in found or entry["total"] > found[name]["total"]:
            found[name] = entry

    _Step(setup, weights, phase, compile_piece).compile()
    return found


class _Step:
    """The shapes of a phase's step, and every piece that it calls; alike stacks share theirs."""

    def __init__(self, setup: Setup, weights: Weights, phase: Phase, compile_piece: Callable[..., None]):
        self._compile, self._placement = compile_piece, setup.placement
        self._window = Window(setup.rack, phase, merge=False)
        self._spec = step_spec(setup.task(phase), phase, self._window)
        self._lean = pieces.lean(self._spec)
        self._state, self._frozen, data, constants = abstract_step(setup, weights, self._spec, phase, self._window)
        self._embed = self._state.learning.get("embed", self._frozen.get("embed"))
        entering = self._embed if self._spec.from_tokens else None
        self._open = entering, data, constants, self._state.step
        self._opened = self._shapes_of_open_step()
        self._passes = range(2 if self._spec.microbatches > 1 else 1)  # a later microbatch adds to what there is

    def compile(self) -> None:
        self._compile(pieces.open_step, (self._lean,), *self._open)
        self._head()
        for k in range(len(self._window.groups)):
            self._stack(k)
        self._ends_of_the_window()

    def _head(self) -> None:
        learning = self._state.learning
        ends = {"head": learning["head"]} if self._spec.train_head else {}
        fixed = {} if self._spec.train_head else {"head": self._frozen["head"]}
        if self._spec.task.rack.tie_embeddings:
            (ends if self._spec.train_embed else fixed)["embed"] = self._embed
        opened, so_far = self._opened, None
        for _ in self._passes:
            args = ends, fixed, opened.batches[0], opened.inputs[0], opened.total, so_far
            self._compile(pieces.head_gradient, (self._lean,), *args)
            so_far = pieces.Gradient(opened.total, opened.total, pieces.widened(self._lean, ends))
        if self._spec.train_head:
            self._learn("head", ends["head"])

    def _stack(self, k: int) -> None:
        opened, stack, learns = self._opened, bare(self._window.groups[k]), self._window.learns[k]
        learning, fixed = self._state.learning["stacks"][k], self._frozen["stacks"][k]
        key = opened.dropout_keys[0] if self._spec.dropout and learns != "nothing" else None
        batch, x_BTD, place = opened.batches[0], opened.inputs[0], (self._state.step, self._state.step)
        self._compile(pieces.forward, (self._lean, stack), learning, fixed, batch, x_BTD, key, place)
        so_far = None
        for _ in self._passes:
            static = self._lean, stack, learns, k > 0 or self._spec.train_embed
            self._compile(pieces.backward, static, learning, fixed, batch, x_BTD, x_BTD, key, place, so_far)
            so_far = None if learns == "nothing" else pieces.widened(self._lean, learning)
        if learns != "nothing":
            self._learn(k, learning)

    def _ends_of_the_window(self) -> None:
        opened, so_far = self._opened, None
        batch, x_BTD = opened.batches[0], opened.inputs[0]
        for _ in self._passes if opened.references else ():
            args = self._frozen["reference"], opened.references[0], x_BTD, opened.total, x_BTD, so_far
            self._compile(pieces.pull_gradient, (self._lean,), *args)
            so_far = opened.total
        if not self._spec.train_embed:
            return
        so_far = pieces.widened(self._lean, self._embed) if self._spec.task.rack.tie_embeddings else None
        for _ in self._passes:
            self._compile(pieces.embed_gradient, (self._lean,), self._embed, batch, x_BTD, so_far)
            so_far = pieces.widened(self._lean, self._embed)
        self._learn("embed", self._embed)

    def _learn(self, part: Part, tree: Tree) -> None:
        cfg, opened = self._spec.optimizer, self._opened
        learning, gradient = as_learning(part, tree), as_learning(part, pieces.widened(self._lean, tree))
        if whole := cfg.grad_clip > 0 and cfg.clip == "global":
            self._compile(pieces.note, (), learning, gradient, opened.tally, donate=(1,))
            gradient = learning  # as it waits: in the dtype of what learns
        opt = jax.eval_shape(make_optimizer(cfg).init, learning)
        opt = _on(self._placement.params(opt), opt)
        args = learning, opt, gradient, opened.total, opened.rounding_key, self._state.step, opened.total, opened.tally
        self._compile(pieces.update, (self._lean, whole), *args, donate=(0, 1))

    def _shapes_of_open_step(self) -> pieces.Opened:
        shapes = jax.eval_shape(lambda *args: pieces.open_step(self._lean, *args), *self._open)
        everywhere = lambda sharding, tree: _on(jax.tree.map(lambda _: sharding, tree), tree)
        spread = ("batches", "inputs", "references")
        split = {name: everywhere(self._placement.batch, getattr(shapes, name)) for name in spread}
        return everywhere(self._placement.replicated, shapes)._replace(**split)


def _on(shardings: Tree, tree: Tree) -> Tree:
    """Shapes with shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
