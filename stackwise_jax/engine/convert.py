"""A run's rack in another shape or format, as a new run directory: regrouped, cut, grown, its adapters merged.

One stack at a time passes through memory: at most the stack that is read and the stack that is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from stackwise_jax.adapters import detach_adapters, merge_adapters, one_adapter
from stackwise_jax.checkpoint import Progress, Store, writing
from stackwise_jax.config import StackWiseConfig
from stackwise_jax.config.schema import CurriculumConfig, Format, StackInit
from stackwise_jax.curriculum import Plan, StackAdapter, make_plan
from stackwise_jax.engine.building import building, check_out
from stackwise_jax.engine.description import recorded_config, write_description
from stackwise_jax.engine.entries import CHECKPOINTS, METRICS, TOKENIZER, digests
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
    regroup,
    zero_outputs,
)
from stackwise_jax.model.regroup import stack_blocks, unstack_blocks
from stackwise_jax.random_streams import Stream, root_key, stream_key

Tree = Any
_NO_NAME = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # what a directory may be called and run.name may not
MergeBase = Literal["trained", "master"]


@dataclass(frozen=True)
class Changes:
    """What becomes of a rack, in this order.

    remove: stacks that are left out. insert: places, counted in what is left, before which a new stack is put (the
    number of stacks: behind the last); it has the shape of the stack before it, or of the first. init: how new stacks
    begin. sizes: blocks per stack in the end; empty: as they are. merge: adapters go into the weights; base: in the
    format in which the adapters met them in training, or their full-precision copy (where it was kept). fmt: how stacks
    are stored, embedding and head in its dense_format; None: as they were, but new ones and those that adapters were
    merged into in full precision: in fewer bits the sum would not compute what was trained.
    """

    remove: tuple[int, ...] = ()
    insert: tuple[int, ...] = ()
    init: StackInit = "zero"
    sizes: tuple[int, ...] = ()
    merge: bool = False
    base: MergeBase = "trained"
    fmt: Format | None = None


@dataclass(frozen=True)
class Slot:
    """A stack of the new rack before regrouping: one of the source's, or a new one in its likeness.

    fmt: how it is stored. used: how it is used, as in the source where nothing of it changes.
    """

    source: int
    fmt: str
    used: str
    new: bool = False


About = tuple[Slot, list[StackAdapter]]


def convert_run(
    source: Source, out: Path | str, changes: Changes, adapters: Source | None = None, seed: int = 0
) -> dict[str, Any]:
    """Write the changed rack as a run directory that all commands read.

    It is written under another name beside `out` and gets its name when it is complete.

    Args:
        out: must not exist.
        adapters: a run whose adapters take the place of the source's own.
        seed: of new stacks.

    Returns:
        {"run", "stacks": blocks per stack, "formats": of the stacks, "adapters": items, "merged_into": the formats of
        the weights that adapters were merged into, "sums": the formats in which the sums are stored, "rounded": whether
        those are less than full precision}.

    Raises:
        UsageError: `out` exists or cannot be made, a stack does not exist, or the changes do not fit together.
        RunError: a checkpoint is damaged, or the disk is full; nothing is left of `out`.
    """
    check_out(out)
    _check_single(source)
    owner, out = adapters or source, Path(out)
    slots = _slots(source, owner, changes)
    merged = [slot for slot in slots if changes.merge and _on_slot(owner, slot, changes)]
    _check_base(source, merged, changes)
    stacks = [source.rack.stacks[slot.source] for slot in slots]
    stacks = tuple(stack.clone(stack_id=i, parent=None) for i, stack in enumerate(stacks))
    rack = source.rack.clone(stacks=stacks, parent=None)
    if changes.sizes:
        rack = regroup(rack, changes.sizes)
    if adapters is not None:
        _check_adapters(source, adapters)
    config = _configuration(source, rack, out)
    plan = make_plan(config, rack_shape(rack, config.data))
    on_slots = [[] if changes.merge else _on_slot(owner, slot, changes) for slot in slots]
    _check_joins(rack, stacks, slots, on_slots)
    read = (_read(source, owner, slot, changes, seed, place) for place, slot in enumerate(slots))
    trees = _regrouped(rack, stacks, read, iter(zip(slots, on_slots, strict=True)))
    with building(out) as path, contextlib.closing(Store(path / CHECKPOINTS)) as store:
        stored, used = _save_items(source, store, changes, trees)
        _finish(source, path, rack, store, used, config, plan)
    return {
        "run": str(out),
        "stacks": [len(stack.blocks) for stack in rack.stacks],
        "formats": sorted({fmt for item, fmt in stored.items() if item.startswith("stacks/")}),
        "adapters": [item for item in stored if item.startswith("adapters/")],
        "merged_into": sorted({_base(source, owner, slot, changes) for slot in merged}),
        "sums": sorted({slot.fmt for slot in merged}),
        "rounded": any(slot.fmt not in ("fp32", source.rack.param_dtype) for slot in merged),
    }


def _save_items(
    source: Source, store: Store, changes: Changes, trees: Iterator[tuple[Tree, About]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Save every item of the new rack as version 1; returns how each is stored and how it is used."""
    stored: dict[str, str] = {}
    used: dict[str, str] = {}

    def save(item: str, tree: Tree, fmt: str, use: str, **more: Any) -> None:
        about = {"phase": f"converted from {source.run_dir}", "loss_history": [], "kind": item.split("/")[0]}
        about |= {"format": fmt, "values": count_values(tree)}
        store.save_item(item, 1, tree, about | more)
        stored[item], used[item] = fmt, use

    master = source.rack.param_dtype
    for item in (EMBED, HEAD):
        saved = source.saved_format(item)
        fmt = dense_format(changes.fmt) if changes.fmt else saved
        tree = source.load(item)
        use = fmt if changes.fmt else source.formats.get(item, fmt)
        save(item, tree if fmt == saved else in_format(tree, master, fmt), fmt, use)
    numbers = itertools.count()  # not enumerate, which keeps the tree that it gave last
    for tree, (slot, on_stack) in trees:
        index, (base, adapter_tree) = next(numbers), detach_adapters(tree)
        save(stack_item(index), base, slot.fmt, slot.used)
        for adapter in on_stack:
            moved = dataclasses.replace(adapter, stack=index)
            spec = dataclasses.asdict(moved.spec)
            save(adapter_item(moved), one_adapter(adapter_tree, moved.name), master, master, adapter=spec)
        del tree, base, adapter_tree
    return stored, used


def _check_single(source: Source) -> None:
    if len(source.experts) > 1:
        raise UsageError(
            f"{source.run_dir} holds {len(source.experts)} denoisers that were trained apart; convert takes one model"
        )


def _slots(source: Source, owner: Source, changes: Changes) -> list[Slot]:
    path = list(source.path)
    if unknown := sorted(set(changes.remove) - set(path)):
        raise UsageError(f"--remove names the stacks {unknown}; {source.run_dir} has {path}")
    if len(set(changes.remove)) < len(changes.remove):
        twice = next(stack for stack in changes.remove if changes.remove.count(stack) > 1)
        raise UsageError(f"--remove names stack {twice} more than once; name each stack once")
    slots = []
    for i in path:
        merged = changes.merge and owner.adapters_of(i)
        fmt = changes.fmt or (source.rack.param_dtype if merged else source.saved_format(stack_item(i)))
        used = fmt if changes.fmt or merged else source.base_format(i)
        slots += [] if i in changes.remove else [Slot(i, fmt, used)]
    if not slots:
        raise UsageError("--remove leaves no stack; keep at least one")
    for place in sorted(changes.insert, reverse=True):
        if not 0 <= place <= len(slots):
            raise UsageError(f"--insert {place} is not in a rack of {len(slots)} stacks; write 0 to {len(slots)}")
        beside = slots[max(place - 1, 0)]
        if changes.init == "copy":
            slots.insert(place, dataclasses.replace(beside, new=True))
        else:
            fmt = changes.fmt or source.rack.param_dtype
            slots.insert(place, Slot(beside.source, fmt, fmt, new=True))
    return slots


def _check_base(source: Source, merged: Sequence[Slot], changes: Changes) -> None:
    """Refuse to merge into full-precision copies that were not kept."""
    if changes.base == "trained":
        return
    for slot in merged:
        if (saved := source.saved_format(stack_item(slot.source))) != source.rack.param_dtype:
            raise UsageError(
                f"--merge_base master: {source.run_dir} keeps stack {slot.source} in {saved} only; leave --merge_base "
                "out to merge into that"
            )


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
        # In the format that the adapters met, and from there on in full precision: what is stored in fewer bits is
        # rounded once more, after all adapters have been added.
        base = _base(source, owner, slot, changes)
        tree = tree if saved == base else in_format(tree, master, base)
        tree = tree if base == master else in_format(tree, master, master)
        for adapter in on_stack:
            tree = jax.device_get(merge_adapters(tree, owner.load(adapter_item(adapter))))
        return tree if slot.fmt == master else jax.device_get(in_format(tree, master, slot.fmt))
    if saved != slot.fmt:
        tree = jax.device_get(in_format(tree, master, slot.fmt))
    return functools.reduce(combine, [owner.load(adapter_item(a)) for a in on_stack], tree)


def _base(source: Source, owner: Source, slot: Slot, changes: Changes) -> str:
    """The format of the weights that the adapters of a stack are merged into."""
    if changes.base == "trained":
        return owner.base_format(slot.source)
    return source.saved_format(stack_item(slot.source))


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
    slot, on_stack = taken[0][1]
    if any(other.used != slot.used for _, (other, _) in taken):
        slot = dataclasses.replace(slot, used=slot.fmt)
    return stack_blocks(stack, [block for block, _ in taken]), (slot, on_stack)


def _finish(
    source: Source, out: Path, rack: Rack, store: Store, formats: dict[str, str], config: StackWiseConfig, plan: Plan
) -> None:
    """Lay down the rest of the run directory, and the record that says what belongs to it."""
    path, versions = list(range(len(rack.stacks))), dict.fromkeys(formats, 1)
    unmeasured = dict.fromkeys(("held_out_loss", "bits_per_byte", "accuracy"))
    nothing = dict.fromkeys(("trainable_params", "frozen_params", "tokens", "flops", "seconds", "skipped_steps"), 0)
    result = {"index": 0, "name": plan.phases[0].name, "depth": len(path), "path": path, **unmeasured, **nothing}
    result |= {"peak_device_bytes": 0, "peak_host_bytes": 0, "cache_bytes": {"host": 0, "disk": 0}}
    result |= {"versions": versions, "formats": formats}
    source.tokenizer().save(out / TOKENIZER)
    with writing(out):
        (out / METRICS).touch()
    write_description(out, plan, rack, recorded_config(config))
    progress = Progress(
        number=1,
        phase=1,
        step=0,
        global_step=source.progress.global_step,
        versions=versions,
        formats=formats,
        data=source.progress.data,
        digests=digests(out),
        results=[result],
        finished=True,
    )
    store.commit(progress)


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
        run=dataclasses.replace(
            before.run, dir=None, name=_NO_NAME.sub("_", out.name), init_from=None, init_depth=None, init_stacks=[]
        ),
        model=dataclasses.replace(before.model, architecture=architecture),
        objective=objective,
        curriculum=CurriculumConfig(plan="joint"),
    )
