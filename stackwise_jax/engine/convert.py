"""A run's rack in another shape or format, as a new run directory: regrouped, cut, grown, its adapters merged.

One stack at a time passes through memory: at most the stack that is read and the stack that is written.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from stackwise_jax.adapters import detach_adapters, merge_adapters, one_adapter
from stackwise_jax.checkpoint import Progress, Store, writing
from stackwise_jax.config import StackWiseConfig, resolved_yaml
from stackwise_jax.config.schema import CurriculumConfig, Format, StackInit
from stackwise_jax.curriculum import Plan, StackAdapter, make_plan, phase_table
from stackwise_jax.engine import directory
from stackwise_jax.engine.shape import rack_shape
from stackwise_jax.engine.source import Source, check_fits
from stackwise_jax.engine.weights import EMBED, HEAD, adapter_item, count_values, in_format, stack_item
from stackwise_jax.errors import UsageError
from stackwise_jax.memory.quantized import dense_format
from stackwise_jax.model import (
    Rack,
    Stack,
    combine,
    init_stack_blocks,
    rack_to_dict,
    regroup,
    zero_outputs,
)
from stackwise_jax.model.regroup import stack_blocks, unstack_blocks
from stackwise_jax.random_streams import Stream, root_key, stream_key

Tree = Any


@dataclass(frozen=True)
class Changes:
    """What becomes of a rack, in this order.

    remove: stacks that are left out. insert: places, counted in what is left, before which a new stack is put (the
    number of stacks: behind the last); it has the shape of the stack before it, or of the first. init: how new stacks
    begin. sizes: blocks per stack in the end; empty: as they are. merge: adapters go into the weights. fmt: how stacks
    are stored, embedding and head in its dense_format; None: as they were, new ones in full precision.
    """

    remove: tuple[int, ...] = ()
    insert: tuple[int, ...] = ()
    init: StackInit = "zero"
    sizes: tuple[int, ...] = ()
    merge: bool = False
    fmt: Format | None = None


@dataclass(frozen=True)
class Slot:
    """A stack of the new rack before regrouping: one of the source's, or a new one in its likeness, in a format."""

    source: int
    fmt: str
    new: bool = False


About = tuple[Slot, list[StackAdapter]]


def convert_run(
    source: Source, out: Path, changes: Changes, adapters: Source | None = None, seed: int = 0
) -> dict[str, Any]:
    """Write the changed rack as a run directory that all commands read.

    Args:
        out: must not exist.
        adapters: a run whose adapters take the place of the source's own.
        seed: of new stacks.

    Returns:
        {"run", "stacks": blocks per stack, "formats": of the stacks, "adapters": items}.

    Raises:
        UsageError: `out` exists, a stack does not exist, or the changes do not fit together.
        RunError: a checkpoint is damaged, or the disk is full.
    """
    _check_ends(source, out)
    slots = _slots(source, changes)
    stacks = [source.rack.stacks[slot.source] for slot in slots]
    stacks = tuple(stack.clone(stack_id=i, parent=None) for i, stack in enumerate(stacks))
    rack = source.rack.clone(stacks=stacks, parent=None)
    if changes.sizes:
        rack = regroup(rack, changes.sizes)
    owner = adapters or source
    if adapters is not None:
        _check_adapters(source, adapters)
    config = _configuration(source, rack, out)
    plan = make_plan(config, rack_shape(rack, config.data))
    on_slots = [[] if changes.merge else _on_slot(owner, slot, changes) for slot in slots]
    _check_joins(rack, stacks, slots, on_slots)
    store = Store(out / directory.CHECKPOINTS, keep=source.config.run.keep)
    meta = {"phase": f"converted from {source.run_dir}", "loss_history": []}
    formats: dict[str, str] = {}

    def save(item: str, tree: Tree, fmt: str, **more: Any) -> None:
        about = {"kind": item.split("/")[0], "format": fmt, "values": count_values(tree)}
        store.save_item(item, 1, tree, meta | about | more)
        formats[item] = fmt

    for item in (EMBED, HEAD):
        fmt = dense_format(changes.fmt) if changes.fmt else source.saved_format(item)
        tree = source.load(item)
        save(item, tree if fmt == source.saved_format(item) else in_format(tree, source.rack.param_dtype, fmt), fmt)
    read = (_read(source, owner, slot, changes, seed, place) for place, slot in enumerate(slots))
    found: list[str] = []
    numbers = itertools.count()  # not enumerate, which keeps the tree that it gave last
    for tree, (slot, on_stack) in _regrouped(rack, stacks, read, iter(zip(slots, on_slots, strict=True))):
        index, (base, adapter_tree) = next(numbers), detach_adapters(tree)
        save(stack_item(index), base, slot.fmt)
        for adapter in on_stack:
            moved = dataclasses.replace(adapter, stack=index)
            spec = dataclasses.asdict(moved.spec)
            save(adapter_item(moved), one_adapter(adapter_tree, moved.name), source.rack.param_dtype, adapter=spec)
            found.append(adapter_item(moved))
        del tree, base, adapter_tree
    _finish(source, out, rack, store, formats, config, plan)
    stored = sorted({fmt for item, fmt in formats.items() if item.startswith("stacks/")})
    blocks = [len(stack.blocks) for stack in rack.stacks]
    return {"run": str(out), "stacks": blocks, "formats": stored, "adapters": found}


def _check_ends(source: Source, out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out} exists; name a directory that does not")
    if len(source.experts) > 1:
        raise UsageError(
            f"{source.run_dir} holds {len(source.experts)} denoisers that were trained apart; convert takes one model"
        )


def _slots(source: Source, changes: Changes) -> list[Slot]:
    path = list(source.path)
    if unknown := sorted(set(changes.remove) - set(path)):
        raise UsageError(f"--remove names the stacks {unknown}; {source.run_dir} has {path}")
    kept = lambda i: Slot(i, changes.fmt or source.saved_format(stack_item(i)))
    slots = [kept(i) for i in path if i not in changes.remove]
    if not slots:
        raise UsageError("--remove leaves no stack; keep at least one")
    for place in sorted(changes.insert, reverse=True):
        if not 0 <= place <= len(slots):
            raise UsageError(f"--insert {place} is not in a rack of {len(slots)} stacks; write 0 to {len(slots)}")
        beside = slots[max(place - 1, 0)]
        copied = beside.fmt if changes.init == "copy" else source.rack.param_dtype
        slots.insert(place, Slot(beside.source, changes.fmt or copied, new=True))
    return slots


def _check_adapters(source: Source, adapters: Source) -> None:
    if not adapters.adapters:
        raise UsageError(f"--adapters {adapters.run_dir} has no adapters; name a run that was trained with some")
    there = sorted({adapter.stack for adapter in adapters.adapters.values()})
    if missing := [stack for stack in there if stack not in source.path]:
        raise UsageError(
            f"--adapters {adapters.run_dir}: they sit on the stacks {there} and {source.run_dir} has no {missing}; "
            "name a run with adapters for this rack"
        )
    check_fits(adapters, {stack: stack for stack in there}, source.rack, "--adapters")


def _on_slot(owner: Source, slot: Slot, changes: Changes) -> list[StackAdapter]:
    """The adapters that a stack brings along; a new one has none, unless it is a copy."""
    return [] if slot.new and changes.init != "copy" else owner.adapters_of(slot.source)


def _check_joins(
    rack: Rack, stacks: Sequence[Stack], slots: Sequence[Slot], on_slots: Sequence[list[StackAdapter]]
) -> None:
    """Refuse to join blocks whose adapters or formats differ."""
    kinds = [
        ({(a.name, a.spec) for a in on_slot}, slot.fmt)
        for stack, slot, on_slot in zip(stacks, slots, on_slots, strict=True)
        for _ in stack.blocks
    ]
    for index, stack in enumerate(rack.stacks):
        taken, kinds = kinds[: len(stack.blocks)], kinds[len(stack.blocks) :]
        if any(adapters != taken[0][0] for adapters, _ in taken):
            raise UsageError(
                f"stack {index} would join blocks whose adapters differ; add --merge_adapters, or other --sizes"
            )
        if len(formats := {fmt for _, fmt in taken}) > 1:
            raise UsageError(
                f"stack {index} would join blocks stored in {' and '.join(sorted(formats))}; add --format with one of "
                "them, or other --sizes"
            )


def _read(source: Source, owner: Source, slot: Slot, changes: Changes, seed: int, place: int) -> Tree:
    """The tree of a stack before regrouping, with the adapters that stay apart, in its format, in host memory."""
    master = source.rack.param_dtype
    if slot.new and changes.init != "copy":
        # A stream of its own for each place: the blocks of the source were made from the seed alone.
        stack, key = source.rack.stacks[slot.source], stream_key(root_key(seed), Stream.INSERTED)
        tree = init_stack_blocks(stack, 0, jax.random.fold_in(key, place))
        tree = zero_outputs(stack, tree) if changes.init == "zero" else tree
        return jax.device_get(tree if slot.fmt == master else in_format(tree, master, slot.fmt))
    item = stack_item(slot.source)
    saved, on_stack = source.saved_format(item), _on_slot(owner, slot, changes)
    tree = source.load(item)
    if changes.merge and on_stack:
        # What is stored in fewer bits is rounded once, after all adapters have been added.
        tree = tree if saved == master else in_format(tree, master, master)
        for adapter in on_stack:
            tree = jax.device_get(merge_adapters(tree, owner.load(adapter_item(adapter))))
        return tree if slot.fmt == master else jax.device_get(in_format(tree, master, slot.fmt))
    if saved != slot.fmt:
        tree = jax.device_get(in_format(tree, master, slot.fmt))
    return functools.reduce(combine, [owner.load(adapter_item(a)) for a in on_stack], tree)


def _regrouped(
    rack: Rack, stacks: Sequence[Stack], read: Iterator[Tree], about: Iterator[About]
) -> Iterator[tuple[Tree, About]]:
    """The trees of the rack's stacks, made of the blocks of `stacks` in their order; about: what each stack was."""
    waiting: list[tuple[Tree, About]] = []  # blocks that were read and not yet written
    old = iter(stacks)  # beside `read` and not zipped with it: zip keeps what it gave last
    for stack in rack.stacks:
        while len(waiting) < len(stack.blocks):
            before, what, tree = next(old), next(about), next(read)
            if not waiting and before.blocks == stack.blocks:
                yield tree, what
                del tree
                break
            waiting += [(block, what) for block in unstack_blocks(before, tree)]
            del tree
        else:
            yield _joined(stack, waiting)


def _joined(stack: Stack, waiting: list[tuple[Tree, About]]) -> tuple[Tree, About]:
    """The first of the blocks that wait as the tree of a stack; they wait no longer."""
    size = len(stack.blocks)
    taken, waiting[:] = waiting[:size], waiting[size:]
    return stack_blocks(stack, [block for block, _ in taken]), taken[0][1]


def _finish(
    source: Source, out: Path, rack: Rack, store: Store, formats: dict[str, str], config: StackWiseConfig, plan: Plan
) -> None:
    """Lay down the rest of the run directory; config.yaml comes last and makes it a run."""
    path, versions = list(range(len(rack.stacks))), dict.fromkeys(formats, 1)
    unmeasured = dict.fromkeys(("held_out_loss", "bits_per_byte", "accuracy"))
    nothing = dict.fromkeys(("trainable_params", "frozen_params", "tokens", "flops", "seconds", "skipped_steps"), 0)
    result = {"index": 0, "name": plan.phases[0].name, "depth": len(path), "path": path, **unmeasured, **nothing}
    result |= {"peak_device_bytes": 0, "peak_host_bytes": 0, "cache_bytes": {"host": 0, "disk": 0}}
    result |= {"versions": versions, "formats": formats}
    store.commit(
        Progress(
            number=1,
            phase=1,
            step=0,
            global_step=source.progress.global_step,
            versions=versions,
            formats=formats,
            data=source.progress.data,
            results=[result],
            finished=True,
        )
    )
    store.close()
    source.tokenizer().save(out / directory.TOKENIZER)
    with writing(out):
        (out / directory.METRICS).touch()
    directory.write_atomically(out / directory.PHASES, json.dumps(phase_table(plan), indent=2) + "\n")
    directory.write_atomically(out / directory.RACK, json.dumps(rack_to_dict(rack), indent=2) + "\n")
    directory.write_atomically(out / directory.CONFIG, resolved_yaml(config))


def _configuration(source: Source, rack: Rack, out: Path) -> StackWiseConfig:
    """The source's configuration with a plan for the new rack: one phase over the whole path, on the last task."""
    before, phase = source.config, source.phase
    sizes = {len(stack.blocks) for stack in rack.stacks}
    architecture = before.model.architecture
    if len(sizes) == 1:
        architecture = dataclasses.replace(architecture, n_stacks=len(rack.stacks), blocks_per_stack=sizes.pop())
    objective = dataclasses.replace(
        before.objective,
        kind=phase.objective.kind,
        attention_mode=phase.attention_mode or "model",
        time="none",
        levels=[],
        interval_overlap=0.0,
    )
    if rack.time_embedding != "none":
        objective = dataclasses.replace(objective, time="input")
    return dataclasses.replace(
        before,
        run=dataclasses.replace(before.run, dir=None, name=out.name, init_from=None, init_depth=None, init_stacks=[]),
        model=dataclasses.replace(before.model, architecture=architecture),
        objective=objective,
        curriculum=CurriculumConfig(plan="joint"),
    )
