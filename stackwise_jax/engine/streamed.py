"""The streamed executor: the window of a phase passes through the device one stack at a time, forward and backward.

On the device at once are two stacks (the one in use and the next, which arrives meanwhile) with the optimizer state of
what learns in them, the gradient of one, the ends, and the inputs of the stacks where `memory.stack_inputs` keeps them
there. So compile time does not grow with depth, and device memory does with those inputs only. It computes what the
resident executor computes. One step:

    forward    stack 0, 1, .., n-1; the input of each is kept
    head       the loss, and its gradient by what enters the final norm, by the head and by a tied embedding
    backward   stack n-1, .., 0, each computed again from its input
    update     of a stack while the gradient of the one below it is computed; where the norm of the whole gradient
               decides (optimizer.clip global), gradients wait beside the optimizer state and a last pass updates

Legend: B batch, T sequence, D d_model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from stackwise_jax.config.schema import MemoryConfig
from stackwise_jax.curriculum.phase import Phase
from stackwise_jax.engine import pieces
from stackwise_jax.engine.carry import State, item_state, shared_state
from stackwise_jax.engine.holdings import Holdings, Part
from stackwise_jax.engine.pieces import Gradient, Opened
from stackwise_jax.engine.programs import StepPrograms, bare
from stackwise_jax.engine.resident import initial_optimizer, join_states, learned_items, split_phase, step_spec
from stackwise_jax.engine.step import StepData, TaskSpec
from stackwise_jax.engine.weights import EMBED, HEAD, Weights, learning_items
from stackwise_jax.engine.window import Layout, Window
from stackwise_jax.memory import Conveyor, Scratch
from stackwise_jax.model import Rack, Stack, combine

Tree = Any
ENDS = {EMBED: 1_000_000, HEAD: 1_000_001}  # streams of their stochastic rounding; stacks take their ids


class Arrived(NamedTuple):
    """What a stack brings to the device."""

    learning: Tree
    frozen: Tree
    inputs: list[jax.Array]  # x_BTD per microbatch; empty on the way forward
    opt: Tree | None


class Streamed:
    """Trains the window of a phase from wherever its weights and optimizer state rest. Used as `Resident` is."""

    def __init__(
        self,
        rack: Rack,
        phase: Phase,
        task: TaskSpec,
        weights: Weights,
        programs: StepPrograms,
        constants: Tree,
        cfg: MemoryConfig,
        scratch: Scratch | None,
        reference: Tree | None = None,
    ):
        """Takes what it trains out of `weights`; a fresh optimizer state. reference: see `resident.split_phase`."""
        self._rack, self._phase, self._weights, self._programs = rack, phase, weights, programs
        self._constants, self._placement = constants, weights.placement
        self._inputs_leave = cfg.stack_inputs == "host"
        self.window = Window(rack, phase, merge=False)
        self.spec = step_spec(task, phase, self.window)
        self._lean = pieces.lean(self.spec)
        self._stacks = [bare(stack) for stack in self.window.groups]
        self._drops = self._drop_places(Window(rack, phase))
        # The norm of the whole gradient is known only when all of it is.
        self._whole = self.spec.optimizer.grad_clip > 0 and self.spec.optimizer.clip == "global"
        self._arrivals = ThreadPoolExecutor(1, thread_name_prefix="arriving")
        trees = {i: weights.full(i) for i in phase.window}
        ends = weights.trees[EMBED], weights.trees[HEAD]
        learning, frozen = split_phase(self.spec, self.window, *ends, trees, reference)
        self._frozen: list[Tree] = list(frozen.pop("stacks"))
        self._frozen_ends: dict[str, Tree] = frozen
        parts: dict[Part, Tree] = {
            k: tree for k, tree in enumerate(learning.pop("stacks")) if self.window.learns[k] != "nothing"
        }
        for item in learning_items(phase):
            weights.drop(item)  # it lives here now
        fresh = lambda part, tree: initial_optimizer(self.spec.optimizer, self._placement, as_learning(part, tree))
        self.held = Holdings(self._placement, scratch, cfg, parts | learning, fresh)
        stream = lambda part: np.int32(ENDS[part] if isinstance(part, str) else phase.window[part])
        put, whole = self._placement.put, self._placement.replicated
        self._streams: dict[Part, jax.Array] = {part: put(stream(part), whole) for part in self.held.opt}
        self._set_counters(0, 0)

    # What a run asks of an executor.

    def resume(self, load: Callable[[str, Tree], Tree], step: int, bad_steps: int) -> None:
        """Go on in the middle of the phase, at a step. load: an entry of `opt` as it was saved, by its name and like
        what there is now."""
        for part, opt in self.held.opt.items():
            self.held.keep_opt(part, load(str(part), opt))
        self._set_counters(step, bad_steps)

    def compile(self, data: StepData) -> None:
        """Nothing: a piece is compiled when it is first called, which is within the first step."""

    @property
    def step_bytes(self) -> int:
        """Bytes of the largest piece that was compiled so far; what rests on the device beside it is not among them."""
        return self._programs.largest_bytes

    def step(self, data: StepData) -> dict[str, jax.Array]:
        """One update; see step.train_step for the scalars."""
        spec, call = self._lean, self._programs.call
        embed = self._end(EMBED) if self.spec.from_tokens else None
        opened: Opened = call(pieces.open_step, (spec,), embed, data, self._constants, self._counters[0])
        self._lr, self._rounding_key, self._tally = data.lr, opened.rounding_key, opened.tally
        x_parts, opened = list(opened.inputs), opened._replace(inputs=())
        # Handed over in lists that are emptied: a name in this function would keep a stack on the device.
        saved, top = self._forward(opened, x_parts)
        dy_parts, found = self._head(opened, x_parts, embed)
        distance = self._backward(opened, saved, top, x_parts, dy_parts, found)
        if self.spec.train_embed:
            gradient = found.ends.get(EMBED)
            for batch, dx_BTD in zip(opened.batches, dy_parts, strict=True):
                gradient = call(pieces.embed_gradient, (spec,), embed, batch, dx_BTD, gradient)
            self._learn(EMBED, embed, None, gradient, found.nll)
        self._update_waiting(found.nll)
        self._counters, metrics = call(
            pieces.close_step, (), opened.sums, found.nll, found.correct, distance, self._tally, *self._counters
        )
        return metrics

    def carried(self, item: str) -> State:
        """The optimizer state of an item that learns."""
        self.held.settle()
        part = self._part_of(item)
        return item_state(self.held.opt[part], self._layout(part), item)

    def carry(self, items: Iterable[tuple[str, State]]) -> None:
        """Begin with the optimizer state that these items have from an earlier phase; one at a time is loaded."""
        fetch = self.held.fetch
        for item, state in items:
            part = self._part_of(item)
            # Under one name for all, so that stacks of equal shape share a program.
            name = item if item in ENDS else re.sub(r"/\d+", "/000", item, count=1)
            opt = join_states(fetch(self.held.opt[part]), self._any_layout(part), {name: fetch(state)})
            self.held.keep_opt(part, opt)
        # Counts of steps belong to all; where parts with unlike counts meet, the largest counts.
        counts = [shared_state(self.held.opt[part], self._any_layout(part)) for part in self.held.opt]
        largest = {name: np.max([np.asarray(count[name]) for count in counts]) for name in counts[0]} if counts else {}
        for part, opt in self.held.opt.items():
            shared = self._placement.put(largest, self._placement.replicated)
            self.held.keep_opt(part, join_states(fetch(opt), self._any_layout(part), {"all": shared}))

    @property
    def opt(self) -> dict[str, Tree]:
        """The optimizer state by parts, which are saved one by one in the middle of a phase."""
        self.held.settle()
        return {str(part): tree for part, tree in self.held.opt.items()}

    @property
    def bad_steps(self) -> int:
        """Steps in a row that were not finite."""
        return int(jax.device_get(self._counters[1]))

    def learned(self) -> dict[str, Tree]:
        """The full trees of the items that learn, by item name, where they rest."""
        self.held.settle()
        learning = {end: self.held.learning[end] for end in ENDS if end in self.held.learning}
        learning["stacks"] = tuple(self.held.learning.get(k, {}) for k in range(len(self._stacks)))
        return learned_items(self.window, self._phase, learning, tuple(self._frozen))

    def evaluated(self) -> tuple[list[tuple[Stack, Tree]], Tree, Tree]:
        """(stacks with their trees from input to head, embed, head) as they are now, where they rest."""
        self.held.settle()
        stacks = [(self._rack.stacks[i], self._weights.full(i)) for i in self._phase.prefix]
        for k, stack in enumerate(self._stacks):
            stacks.append((stack, combine(self.held.learning.get(k, {}), self._frozen[k])))
        return stacks, self._end(EMBED), self._end(HEAD)

    # The parts of a step.

    def _forward(self, opened: Opened, x_parts: list[jax.Array]) -> tuple[list[list[jax.Array]], list[Arrived]]:
        """(inputs of each stack per microbatch, at rest; the last stack, still there). x_parts: the inputs of the first
        stack, which make room for the outputs of the last."""
        before, saved, top = None, [], []
        belt = Conveyor(lambda k: self._arrive(k, None), range(len(self._stacks)), self._arrivals)
        for k in range(len(self._stacks)):
            top = [belt.take()]
            saved.append(self._lay_by(x_parts[:]))
            y_parts = [
                self._programs.call(
                    pieces.forward,
                    (self._lean, self._stacks[k]),
                    top[0].learning,
                    top[0].frozen,
                    batch,
                    x_BTD,
                    self._key(opened, k, m),
                    self._drops[k],
                )
                for m, (batch, x_BTD) in enumerate(zip(opened.batches, x_parts, strict=True))
            ]
            belt.advance(before)
            before, x_parts[:] = y_parts, y_parts
        return saved, top

    def _head(self, opened: Opened, y_parts: list[jax.Array], embed: Tree | None) -> tuple[list[jax.Array], Gradient]:
        """(the gradient of each output of the last stack, loss and gradients of the ends that learn from it)."""
        tied = self.spec.task.rack.tie_embeddings
        ends = {HEAD: self._end(HEAD)} if self.spec.train_head else {}
        frozen = {} if self.spec.train_head else {HEAD: self._end(HEAD)}
        if tied:
            (ends if self.spec.train_embed else frozen)[EMBED] = self._end(EMBED) if embed is None else embed
        found: Gradient | None = None
        dy_parts = []
        for batch, y_BTD in zip(opened.batches, y_parts, strict=True):
            dy_BTD, found = self._programs.call(
                pieces.head_gradient, (self._lean,), ends, frozen, batch, y_BTD, opened.total, found
            )
            dy_parts.append(dy_BTD)
        assert found is not None
        if self.spec.train_head:
            self._learn(HEAD, ends[HEAD], None, found.ends.pop(HEAD), found.nll)
        return dy_parts, found

    def _backward(
        self,
        opened: Opened,
        saved: list[list[jax.Array]],
        top: list[Arrived],
        y_parts: list[jax.Array],
        dy_parts: list[Any],
        found: Gradient,
    ) -> jax.Array | None:
        """The sum of the distances that consistency counts. dy_parts: the gradients of the outputs of the last stack,
        which make room for those of the inputs of the first; saved, top and y_parts are used up."""
        n, distance, before = len(self._stacks), None, None
        last = max((k for k in range(n) if k in self.held.learning), default=-1)
        if top:
            top.append(top.pop()._replace(inputs=self._inputs(saved.pop()), opt=self._opt_of(n - 1)))
        belt = Conveyor(lambda k: self._arrive(k, saved.pop()), range(n - 2, -1, -1), self._arrivals)
        for k in range(n - 1, -1, -1):
            arrived = top.pop() if top else belt.take()
            if opened.references and k == last:
                distance, dy_parts[:] = self._pull(opened, y_parts, dy_parts)
            gradient, y_parts[:] = None, arrived.inputs if opened.references else []
            after, dy_parts[:] = dy_parts[:], []
            for m, (batch, x_BTD) in enumerate(zip(opened.batches, arrived.inputs, strict=True)):
                dx_BTD, gradient = self._programs.call(
                    pieces.backward,
                    (self._lean, self._stacks[k], self.window.learns[k], k > 0 or self.spec.train_embed),
                    arrived.learning,
                    arrived.frozen,
                    batch,
                    x_BTD,
                    after[m],
                    self._key(opened, k, m),
                    self._drops[k],
                    gradient,
                )
                dy_parts.append(dx_BTD)
            if k in self.held.learning:
                self._learn(k, arrived.learning, arrived.opt, gradient, found.nll)
            else:
                self.held.settle()  # the head, before a third thing comes
            del arrived, gradient, after
            belt.advance(before)
            before = dy_parts[:]
        return distance

    def _pull(
        self, opened: Opened, y_parts: list[jax.Array], dy_parts: list[jax.Array]
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Consistency: (the sum of the distances, gradients of the outputs with their share)."""
        pulled, distance = [], None
        for earlier, y_BTD, dy_BTD in zip(opened.references, y_parts, dy_parts, strict=True):
            distance, dy_BTD = self._programs.call(
                pieces.pull_gradient,
                (self._lean,),
                self._frozen_ends["reference"],
                earlier,
                y_BTD,
                opened.pull,
                dy_BTD,
                distance,
            )
            pulled.append(dy_BTD)
        assert distance is not None
        return distance, pulled

    def _learn(self, part: Part, learning: Tree, opt: Tree | None, gradient: Tree, nll: jax.Array) -> None:
        """Update a part, or let its gradient wait for the norm of the whole. learning, opt: on the device."""
        learning, gradient = as_learning(part, learning), as_learning(part, gradient)
        if self._whole:
            gradient, self._tally = self._programs.call(pieces.note, (), learning, gradient, self._tally, donate=(1,))
            return self.held.send_gradient(part, gradient)
        self._update(part, learning, self._opt_of(part) if opt is None else opt, gradient, nll)

    def _update(self, part: Part, learning: Tree, opt: Tree, gradient: Tree, nll: jax.Array) -> None:
        learning, opt, self._tally = self._programs.call(
            pieces.update,
            (self._lean, self._whole),
            learning,
            opt,
            gradient,
            self._lr,
            self._rounding_key,
            self._streams[part],
            nll,
            self._tally,
            donate=(0, 1),
        )
        self.held.send_home(part, _of_learning(part, learning), opt)

    def _update_waiting(self, nll: jax.Array) -> None:
        """The last pass, where the norm of the whole gradient was waited for."""
        self.held.settle()
        waiting, self.held.waiting = self.held.waiting, {}
        held = self.held
        load = lambda part: (held.weights_of(part), held.opt_of(part), held.fetch(waiting.pop(part)))
        order, before = [*waiting], None
        belt = Conveyor(load, order, self._arrivals)
        for part in order:
            weights, opt, gradient = belt.take()
            self._update(part, as_learning(part, weights), opt, gradient, nll)
            del weights, opt, gradient
            belt.advance(before)
            before = self._tally

    # What comes to the device.

    def _arrive(self, k: int, inputs: list[jax.Array] | None) -> Arrived:
        """A stack, brought to the device; on the way back with its inputs and the optimizer state."""
        learning = self.held.weights_of(k) if k in self.held.learning else {}
        frozen = self.held.fetch(self._frozen[k])
        if inputs is None:
            return Arrived(learning, frozen, [], None)
        return Arrived(learning, frozen, self._inputs(inputs), self._opt_of(k))

    def _opt_of(self, part: Part) -> Tree | None:
        """The optimizer state of a part on the device, where it is wanted at once."""
        if self._whole or part not in self.held.opt:
            return None
        return self.held.opt_of(part)

    def _inputs(self, x_parts: list[jax.Array]) -> list[jax.Array]:
        return self._placement.put(x_parts, self._placement.batch) if self._inputs_leave else x_parts

    def _lay_by(self, x_parts: list[jax.Array]) -> list[jax.Array]:
        return self._placement.put(x_parts, self._placement.host_batch) if self._inputs_leave else x_parts

    def _end(self, end: str) -> Tree:
        """Embedding or head on the device."""
        if end in self.held.learning:
            return self.held.weights_of(end)
        return self._weights.on_device(end)

    # Small things.

    def _key(self, opened: Opened, k: int, m: int) -> jax.Array | None:
        drops = self.spec.dropout and self.window.learns[k] != "nothing"
        return opened.dropout_keys[m] if drops else None

    def _drop_places(self, merged: Window) -> list[tuple[jax.Array, jax.Array]]:
        """For each stack its group in the resident step and its first block there: those decide what drops."""
        places = []
        for group, (ids, sizes) in enumerate(merged.layout):
            firsts = np.cumsum([0, *sizes[:-1]], dtype=np.int32)
            places += [(np.int32(group), first) for first, _ in zip(firsts, ids, strict=True)]
        return self._placement.put(places, self._placement.replicated)

    def _part_of(self, item: str) -> Part:
        return item if item in ENDS else self._phase.window.index(int(item.split("/")[1]))

    def _layout(self, part: Part) -> Layout:
        return () if isinstance(part, str) else (self.window.layout[part],)

    def _any_layout(self, part: Part) -> Layout:
        """The layout of the part as if it were stack 0."""
        return () if isinstance(part, str) else (((0,), self.window.layout[part][1]),)

    def _set_counters(self, step: int, bad_steps: int) -> None:
        self._counters = self._placement.put((np.int32(step), np.int32(bad_steps)), self._placement.replicated)


def as_learning(part: Part, tree: Tree) -> Tree:
    """The tree of a part as a learning tree of its own, in which optimizers and adapters know their leaves by path."""
    return {part: tree} if isinstance(part, str) else {"stacks": (tree,)}


def _of_learning(part: Part, learning: Tree) -> Tree:
    return learning[part] if isinstance(part, str) else learning["stacks"][0]
