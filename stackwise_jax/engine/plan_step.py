"""Device bytes of the training step of a phase, by part: of the resident step and of the streamed executor.

A part's source says how it is known (memory/budget.py). Bytes are those of one device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from stackwise_jax.config.schema import MemoryConfig, OptimizerConfig
from stackwise_jax.curriculum import Phase
from stackwise_jax.engine.dryrun import abstract_step, device_bytes, placed
from stackwise_jax.engine.holdings import homes
from stackwise_jax.engine.optimizer import make_optimizer
from stackwise_jax.engine.plan_bytes import (
    block_moment,
    head_moment,
    kept_for_backward,
    tree_bytes,
    update_moment,
)
from stackwise_jax.engine.programs import StepPrograms, bare, compiled_bytes
from stackwise_jax.engine.recorder import optimizer_items
from stackwise_jax.engine.resident import step_spec
from stackwise_jax.engine.setup import Setup
from stackwise_jax.engine.step import StepSpec
from stackwise_jax.engine.streamed_bytes import piece_bytes
from stackwise_jax.engine.weights import EMBED, HEAD, Weights, item_format, stack_item
from stackwise_jax.engine.window import Window
from stackwise_jax.memory.budget import Part, Source
from stackwise_jax.model import dtype_of
from stackwise_jax.objectives import max_targets

Tree = Any
Parts = dict[str, Part]


def exact(n: float) -> Part:
    """Bytes known from shapes."""
    return Part(int(n), "shapes")


def estimated(n: float) -> Part:
    """Bytes known by formula."""
    return Part(int(n), "formula")


def total(parts: Parts) -> int:
    """Bytes of all parts."""
    return sum(part.bytes for part in parts.values())


def largest(moments: Iterable[Parts]) -> Parts:
    """The moment that needs most."""
    return max(moments, key=total)


def added(parts: Parts, more: Parts) -> Parts:
    """Both, parts of one name summed; a sum is known as badly as its worse half."""
    result = dict(parts)
    for name, part in more.items():
        old = result.get(name)
        source: Source = "formula" if old and "formula" in (old.source, part.source) else part.source
        result[name] = part if old is None else Part(old.bytes + part.bytes, source)
    return result


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the formulas of one phase depend on."""

    rows: int  # sequences of a microbatch on one device
    seq_len: int
    predicted: int  # positions of each that go through the head
    shards: int  # devices that the batch is spread over
    accumulates: bool  # gradients of microbatches are summed in float32

    @classmethod
    def of(cls, setup: Setup, phase: Phase) -> Sizes:
        """Those of a phase."""
        data, shards = setup.config.data, setup.placement.mesh.size
        n = phase.optimizer.microbatches
        predicted = max_targets(phase.objective, phase.noise, data.seq_len)
        rows = max(data.batch_size // n // shards, 1)
        return cls(rows, data.seq_len, min(predicted, data.seq_len), shards, n > 1)

    def hidden(self, setup: Setup) -> Any:
        """The shape of the activations of a microbatch on one device."""
        dtype = dtype_of(setup.rack.compute_dtype)
        return jax.ShapeDtypeStruct((self.rows, self.seq_len, setup.rack.d_model), dtype)


def resident_parts(setup: Setup, weights: Weights, phase: Phase, programs: StepPrograms | None) -> tuple[Parts, Parts]:
    """(parts on the device: exact arguments, and temporaries from the compiled step or by formula; "saving": the
    optimizer state that a checkpoint inside the phase has in host memory at a time).

    Args:
        programs: compiles the step; None: formulas.
    """
    window = Window(setup.rack, phase)
    spec = step_spec(setup.task(phase), phase, window)
    arguments = abstract_step(setup, weights, spec, phase, window)
    state, frozen, data, _ = arguments
    learning_bytes = device_bytes(state.learning)
    parts = {
        "weights": exact(device_bytes(frozen)),
        "learning weights": exact(learning_bytes),
        "optimizer": exact(device_bytes(state.opt)),
        "gradients": exact(learning_bytes),
        "data": exact(device_bytes(data)),
    }
    saved = [sum(x.size * x.dtype.itemsize for x in leaves.values()) for _, leaves in optimizer_items("", state.opt)]
    saving: Parts = {"saving": exact(max(saved, default=0))}
    if programs is not None:
        temporaries = compiled_bytes(programs.get(spec, *arguments))["temporaries"]
        return parts | {"activations": Part(max(temporaries - learning_bytes, 0), "compiled")}, saving
    return added(parts, _resident_temporaries(setup, phase, spec, state.learning, frozen, learning_bytes)), saving


def _resident_temporaries(
    setup: Setup, phase: Phase, spec: StepSpec, learning: Tree, frozen: Tree, learning_bytes: int
) -> Parts:
    """What the formulas say beside arguments and one copy of the gradients, at the moment that needs most."""
    sizes = Sizes.of(setup, phase)
    entries = _entries(learning)
    sums = exact(4 * entries if sizes.accumulates else 0)
    kept = moment = 0
    for stack, learns, free, fixed in zip(spec.groups, spec.learns, learning["stacks"], frozen["stacks"], strict=True):
        x_BTD = sizes.hidden(setup)
        mode, dropout = spec.task.attention_mode, spec.dropout and learns != "nothing"
        kept += kept_for_backward(bare(stack), free, fixed, x_BTD, mode, dropout)
        block = block_moment(stack.blocks[0], sizes.rows, sizes.seq_len, learns == "weights")
        if stack.remat:
            one = dataclasses.replace(bare(stack), remat=False, blocks=stack.blocks[:1])
            first = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), tree)
            if stack.block_alike:
                block += kept_for_backward(one, first(free), first(fixed), x_BTD, mode, dropout)
        moment = max(moment, block if len(stack.blocks) > 1 else 0)
    # The loop over one block is no loop: what it keeps is freed as its backward pass goes on.
    learns_head = spec.train_head or (spec.train_embed and setup.rack.tie_embeddings)
    head = head_moment(setup.rack, sizes.rows, sizes.predicted, learns=learns_head, shards=sizes.shards)
    update = update_moment(spec.optimizer, learning_bytes, entries)
    return largest(
        (
            {
                "gradients": exact(sums.bytes - learning_bytes),
                "activations": estimated(kept),
                "head loss": estimated(head),
            },
            {"gradients": sums, "activations": estimated(kept + moment)},
            {"update": estimated(update)},
        )
    )


def _entries(tree: Tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class StackBytes:
    """One stack of the window as the streamed executor meets it."""

    learning: int
    frozen: int
    opt: int
    entries: int  # numbers that learn
    kept: int  # for its backward pass
    moment: int  # while its last block goes backward


@dataclasses.dataclass(frozen=True)
class EndBytes:
    """The embedding or the head."""

    weights: int
    learns: bool
    opt: int
    entries: int


def streamed_parts(
    setup: Setup, weights: Weights, phase: Phase, memory: MemoryConfig, programs: StepPrograms | None
) -> tuple[Parts, Parts]:
    """(parts on the device at the moment that needs most, parts where learning state rests off the device and
    "saving": the largest optimizer state of a part, which is saved alone).

    Args:
        programs: compiles the pieces of the step, whose temporaries are read off; None: formulas.
    """
    sizes, home, opt_home = Sizes.of(setup, phase), *homes(memory)
    stacks, ends = _stacks(setup, weights, phase, sizes), _ends(setup, weights, phase)
    cfg = phase.optimizer
    waits = cfg.grad_clip > 0 and cfg.clip == "global"
    learning = sum(s.learning for s in stacks) + sum(e.weights for e in ends.values() if e.learns)
    opt = sum(s.opt for s in stacks) + sum(e.opt for e in ends.values())
    away: Parts = {"saving": exact(max([0, *(s.opt for s in stacks), *(e.opt for e in ends.values())]))}
    if home != "device":
        away["learning weights"] = exact(learning)
    if opt_home != "device":
        away["optimizer"] = exact(opt)
        if waits:
            away["gradients"] = exact(learning)
    hidden = tree_bytes(sizes.hidden(setup)) * phase.optimizer.microbatches
    kept_inputs = hidden * (3 if memory.stack_inputs == "host" else len(stacks) + 3)
    if memory.stack_inputs == "host":
        away["activations"] = exact(hidden * len(stacks))
    resting = {
        "learning weights": exact(learning if home == "device" else 0),
        "optimizer": exact(opt if opt_home == "device" else 0),
        "gradients": exact(learning if waits and opt_home == "device" else 0),
        "activations": exact(kept_inputs),
    }
    tied = setup.rack.tie_embeddings
    used = {HEAD: ends[HEAD]} if phase.prefix and not tied else ends
    resting = added(resting, {"weights": exact(sum(e.weights for e in used.values() if not e.learns))})
    if phase.train_embed and home != "device":
        resting = added(resting, {"learning weights": exact(ends[EMBED].weights)})
    found = {} if programs is None else piece_bytes(setup, weights, phase, programs)
    temporaries = {name: entry["temporaries"] for name, entry in found.items()}
    # While the head is at work the last stack is still there and the one below it has arrived.
    pairs = _pairs(stacks, ends[HEAD], waits)
    last = _pair_parts(stacks[-1], stacks[-2] if len(stacks) > 1 else None, home, "device") if stacks else {}
    moments = [
        *(added(last, m) for m in _head_moments(setup, phase, sizes, ends, home, opt_home, temporaries)),
        *(m for pair in pairs for m in _stack_moments(*pair, cfg, sizes, home, opt_home, temporaries)),
    ]
    if phase.train_embed:
        leaving = _pair_parts(stacks[0], None, home, opt_home) if stacks else {}
        moments.append(added(leaving, _update_parts(ends[EMBED], phase, sizes, opt_home, temporaries)))
    return added(resting, largest(moments)), away


def _read_off(temporaries: dict[str, int], piece: str, formula: int) -> Part:
    """The temporaries of a piece where it was compiled, else what the formula says."""
    return Part(temporaries[piece], "compiled") if piece in temporaries else estimated(formula)


def _head_moments(
    setup: Setup, phase: Phase, sizes: Sizes, ends: dict, home: str, opt_home: str, temporaries: dict[str, int]
) -> list[Parts]:
    """The loss, then the update of the head."""
    head = ends[HEAD]
    learns = head.learns or (phase.train_embed and setup.rack.tie_embeddings)
    loss = head_moment(setup.rack, sizes.rows, sizes.predicted, learns=learns, shards=sizes.shards)
    there: Parts = {"learning weights": exact(head.weights if head.learns and home != "device" else 0)}
    gradient = head.weights if head.learns else 0
    loss_part = _read_off(temporaries, "head_gradient", loss)
    moments = [there | {"gradients": exact(gradient), "head loss": loss_part}]
    if head.learns:
        moments.append(added(there, _update_parts(head, phase, sizes, opt_home, temporaries)))
    return moments


def _update_parts(end: EndBytes, phase: Phase, sizes: Sizes, opt_home: str, temporaries: dict[str, int]) -> Parts:
    """Gradient, state and copies while an end is updated."""
    gradient = end.weights + (4 * end.entries if sizes.accumulates else 0)
    return {
        "gradients": exact(gradient),
        "optimizer": exact(end.opt if opt_home != "device" else 0),
        "update": _read_off(temporaries, "update", update_moment(phase.optimizer, end.weights, end.entries)),
    }


def _pairs(stacks: list[StackBytes], head: EndBytes, waits: bool) -> list[tuple[StackBytes, StackBytes | None]]:
    """Each stack, with the one that arrives while it goes backward (or the one above, which leaves before that). The
    head leaves while the last stack goes backward; where updates wait, while the last that learns is updated."""
    pairs: list[tuple[StackBytes, StackBytes | None]] = list(zip(stacks, [None, *stacks[:-1]], strict=True))
    if not head.learns or not stacks:
        return pairs
    leaving = StackBytes(head.weights, 0, head.opt, head.entries, 0, 0)
    if waits:
        return pairs + [(stack, leaving) for stack in [stack for stack in stacks if stack.entries][-1:]]
    last, arriving = pairs.pop()
    return [*pairs, (last, leaving if arriving is None else _sum(arriving, leaving))]


def _sum(a: StackBytes, b: StackBytes) -> StackBytes:
    return StackBytes(*(getattr(a, f.name) + getattr(b, f.name) for f in dataclasses.fields(StackBytes)))


def _pair_parts(stack: StackBytes, beside: StackBytes | None, home: str, opt_home: str) -> Parts:
    """What two stacks bring to the device, where it does not rest there."""
    pair = [stack] if beside is None else [stack, beside]
    return {
        "weights": exact(sum(s.frozen for s in pair)),
        "learning weights": exact(0 if home == "device" else sum(s.learning for s in pair)),
        "optimizer": exact(0 if opt_home == "device" else sum(s.opt for s in pair)),
    }


def _stack_moments(
    stack: StackBytes,
    beside: StackBytes | None,
    cfg: OptimizerConfig,
    sizes: Sizes,
    home: str,
    opt_home: str,
    temporaries: dict[str, int],
) -> list[Parts]:
    """Backward through a stack, then its update; the device computes one after the other. Where the update waits for
    the norm of the whole gradient, only then is the optimizer state there, and the gradient of the stack beside too."""
    waits = cfg.grad_clip > 0 and cfg.clip == "global"
    gradient = stack.learning + (4 * stack.entries if sizes.accumulates else 0)
    activations = _read_off(temporaries, "backward", stack.kept + stack.moment)
    there = _pair_parts(stack, beside, home, "device" if waits else opt_home)
    moments = [there | {"gradients": exact(gradient), "activations": activations}]
    if stack.entries:
        there = _pair_parts(stack, beside, home, opt_home)
        waiting = beside.learning if waits and beside is not None and opt_home != "device" else 0
        gradient = waiting + (stack.learning if waits else gradient)
        update = _read_off(temporaries, "update", update_moment(cfg, stack.learning, stack.entries))
        moments.append(there | {"gradients": exact(gradient), "update": update})
    return moments


def _stacks(setup: Setup, weights: Weights, phase: Phase, sizes: Sizes) -> list[StackBytes]:
    """The stacks of the window; those of equal shape are looked at once."""
    window = Window(setup.rack, phase, merge=False)
    spec = step_spec(setup.task(phase), phase, window)
    trees, kinds = {}, []
    for (index,), stack, learns in zip(window.ids, window.groups, window.learns, strict=True):
        fmt = item_format(phase, stack_item(index), weights.master)
        adapters = tuple((a.name, a.spec) for a in phase.adapters if a.stack == index)
        kinds.append((bare(stack), learns, fmt, adapters))
        first = window.ids[kinds.index(kinds[-1])][0]
        trees[index] = trees[first] if first in trees else weights.full_shapes(index, fmt)
    known: dict[Any, StackBytes] = {}
    for kind, free, fixed in zip(kinds, *window.split(trees), strict=True):
        if kind not in known:
            known[kind] = _stack_bytes(setup, phase, spec, kind[0], kind[1], free, fixed, sizes)
    return [known[kind] for kind in kinds]


def _stack_bytes(
    setup: Setup, phase: Phase, spec: StepSpec, stack: Any, learns: str, free: Tree, fixed: Tree, sizes: Sizes
) -> StackBytes:
    dropout = spec.dropout and learns != "nothing"
    x_BTD, mode = sizes.hidden(setup), spec.task.attention_mode
    kept = kept_for_backward(stack, free, fixed, x_BTD, mode, dropout)
    moment = block_moment(stack.blocks[0], sizes.rows, sizes.seq_len, learns == "weights")
    entries = _entries(free) if learns != "nothing" else 0
    learning_bytes = tree_bytes(free) if entries else 0
    opt = opt_bytes(setup, phase.optimizer, {"stacks": (free,)}) if entries else 0
    return StackBytes(learning_bytes, tree_bytes(fixed), opt, entries, kept, moment if len(stack.blocks) > 1 else 0)


def _ends(setup: Setup, weights: Weights, phase: Phase) -> dict[str, EndBytes]:
    ends = {}
    for item, learns in ((EMBED, phase.train_embed), (HEAD, phase.train_head)):
        tree = weights.shapes(item, item_format(phase, item, weights.master))
        opt = opt_bytes(setup, phase.optimizer, {item: tree}) if learns else 0
        ends[item] = EndBytes(tree_bytes(tree), learns, opt, _entries(tree))
    return ends


def opt_bytes(setup: Setup, cfg: OptimizerConfig, learning: Tree) -> int:
    """Bytes on one device of the optimizer state of what learns."""
    return device_bytes(placed(setup.placement, jax.eval_shape(make_optimizer(cfg).init, learning)))
