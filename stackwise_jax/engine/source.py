"""A run as a source of weights: the items of its rack, as it ended or as it was at a depth, loaded one by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from stackwise_jax.adapters import merge_adapters
from stackwise_jax.checkpoint import Progress, Store
from stackwise_jax.config import StackWiseConfig
from stackwise_jax.curriculum import AdapterSpec, Phase, Plan, StackAdapter, make_plan
from stackwise_jax.data import Tokenizer, load_tokenizer
from stackwise_jax.engine.directory import CHECKPOINTS, CONFIG, TOKENIZER, check_unchanged, read_config, read_rack
from stackwise_jax.engine.shape import rack_shape
from stackwise_jax.engine.weights import adapter_item, stack_item
from stackwise_jax.errors import UsageError
from stackwise_jax.model import Block, Rack

Tree = Any
# What of a block does not change the meaning of its weights.
FREE_FIELDS = frozenset({"attention_mode", "dropout", "freeze_up_proj", "param_dtype", "compute_dtype"})


class Source:
    """The newest state of a run.

    versions, formats: of the items; path: the stacks, input to head; phase: the last that trained this path.

    Args:
        run_dir: the run directory.
        depth: as the rack was when it had so many stacks on its path; None: as it is.
        expert: the index of a phase that has ended: as its path was when it ended.

    Raises:
        UsageError: there is no run, no checkpoint in it yet, or no such depth.
        RunError: a checkpoint is damaged.
    """

    def __init__(self, run_dir: str | Path, depth: int | None = None, expert: int | None = None):
        self.run_dir = Path(run_dir)
        self.config = read_config(self.run_dir)
        self.store = Store(self.run_dir / CHECKPOINTS, keep=self.config.run.keep)
        progress = self.store.latest()
        if progress is None:
            raise UsageError(f"{run_dir} holds no checkpoint yet; let train reach its first save")
        self.progress: Progress = progress
        self.rack: Rack = read_rack(self.run_dir)
        self.plan: Plan = make_plan(self.config, rack_shape(self.rack, self.config.data))
        self._choose(depth, expert)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run. Raises UsageError when it is not the one that the run was trained with."""
        tokenizer = load_tokenizer(self.config.tokenizer, None, self.run_dir / TOKENIZER)
        check_unchanged(self.run_dir, self.progress, {"tokenizer": tokenizer.fingerprint})
        return tokenizer

    def load(self, item: str, like: Tree = None) -> Tree:
        """One item in full precision; `like` as in Store.load_item."""
        return self.store.load_item(item, self.versions[item], like)

    def load_merged(self, stack: int, like: Tree) -> Tree:
        """A stack in full precision with its adapters merged into it."""
        tree = self.load(stack_item(stack), like)
        for adapter in self.adapters_of(stack):
            tree = _merge(tree, jax.device_put(self.load(adapter_item(adapter))))
        return tree

    def adapters_of(self, stack: int) -> list[StackAdapter]:
        """The adapters that a stack has."""
        return [adapter for adapter in self.adapters.values() if adapter.stack == stack]

    def _choose(self, depth: int | None, expert: int | None) -> None:
        progress, phases = self.progress, self.plan.phases
        if progress.step > 0 or not progress.results:
            index = min(progress.phase, len(phases) - 1)
            now = (progress.versions, progress.formats, index)
        else:
            now = _ended(progress.results[-1])
        chosen, path = now, phases[now[2]].path
        if expert is not None:
            chosen = next(_ended(result) for result in reversed(progress.results) if result["index"] == expert)
            path = phases[expert].path
        elif depth is not None and depth != len(path):
            at_depth = [r for r in progress.results if len(phases[r["index"]].path) == depth]
            if at_depth:
                chosen = _ended(at_depth[-1])
                path = phases[chosen[2]].path
            elif 1 <= depth <= len(path):
                path = path[:depth]
            else:
                raise UsageError(f"--depth {depth} is not in this run; write 1 to {len(path)} stacks")
        self.versions, self.formats, self.index = chosen
        self.path: tuple[int, ...] = path
        self.phase: Phase = phases[self.index]
        adapters = {item: self._adapter(item) for item in self.versions if item.startswith("adapters/")}
        self.adapters = {item: adapter for item, adapter in adapters.items() if adapter.stack in path}

    def _adapter(self, item: str) -> StackAdapter:
        _, stack, name = item.split("/")
        spec = dict(self.store.item_meta(item, self.versions[item])["adapter"])
        spec["targets"] = tuple(spec["targets"])
        return StackAdapter(stack=int(stack), name="trunk" if name == "trunk" else "stack", spec=AdapterSpec(**spec))

    @property
    def experts(self) -> list[int]:
        """The phases that ended and whose paths share no stack with a later one: each is a model of its own."""
        found, covered = [], set()
        for result in reversed(self.progress.results):
            path = set(self.plan.phases[result["index"]].path)
            if not path & covered:
                found.append(result["index"])
            covered |= path
        return found[::-1]


def _ended(result: dict) -> tuple[dict, dict, int]:
    return result["versions"], result["formats"], result["index"]


_merge = jax.jit(merge_adapters)


def check_fits(source: Source, stacks: dict[int, int], rack: Rack, key: str) -> None:
    """Refuse a rack that cannot take the stacks of another run.

    Args:
        stacks: stack of `rack` -> stack of the source.
        key: the key that names the source.

    Raises:
        UsageError: the first thing that differs, with both values.
    """
    where = f"{key} {source.run_dir}"
    for name in ("d_model", "vocab_size", "tie_embeddings", "time_embedding"):
        ours, theirs = getattr(rack, name), getattr(source.rack, name)
        if ours != theirs:
            what = "objective.time and model.time_embedding" if name == "time_embedding" else f"model.{name}"
            raise UsageError(f"{where}: its {name} is {theirs} and here it is {ours}; write {what} as in that run")
    for ours, theirs in stacks.items():
        new, old = rack.stacks[ours].blocks, source.rack.stacks[theirs].blocks
        if len(new) != len(old):
            raise UsageError(
                f"{where}: its stack {theirs} has {len(old)} blocks and stack {ours} here has {len(new)}; write "
                f"model.architecture.blocks_per_stack {len(old)}"
            )
        for a, b in zip(new, old, strict=True):
            if name := _difference(a, b):
                raise UsageError(
                    f"{where}: {name} of its stack {theirs} is {getattr(b, name)} and of stack {ours} here "
                    f"{getattr(a, name)}; write model.{name} {getattr(b, name)}"
                )


def _difference(a: Block, b: Block) -> str | None:
    names = [f.name for f in dataclasses.fields(a) if f.name not in FREE_FIELDS | {"parent", "name"}]
    return next((name for name in names if getattr(a, name) != getattr(b, name)), None)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the first weights of a run come from. stacks: stack of the run -> stack of the source."""

    source: Source
    stacks: dict[int, int]

    def load(self, item: str, like: Tree) -> Tree | None:
        """An item of the new run with its adapters merged, in full precision; None: the source does not have it."""
        if not item.startswith("stacks/"):
            return self.source.load(item, like)
        stack = int(item.split("/")[1])
        return self.source.load_merged(self.stacks[stack], like) if stack in self.stacks else None


def origin_for(config: StackWiseConfig, rack: Rack, tokenizer: Tokenizer) -> Origin | None:
    """What run.init_from, init_depth and init_stacks name.

    Raises:
        UsageError: there is no such run, depth or stack, or it fits this rack or tokenizer not.
    """
    run = config.run
    if run.init_from is None:
        return None
    try:
        source = Source(run.init_from, run.init_depth)
    except UsageError as error:
        raise UsageError(f"run.init_from, init_depth: {str(error).replace('--depth', 'run.init_depth')}") from None
    if unknown := sorted(set(run.init_stacks) - set(source.path)):
        raise UsageError(f"run.init_stacks names {unknown}; {source.run_dir} has the stacks {list(source.path)}")
    taken = run.init_stacks or source.path
    if len(taken) > len(rack.stacks):
        raise UsageError(
            f"run.init_from {source.run_dir} gives {len(taken)} stacks and this rack has {len(rack.stacks)}; name as "
            f"many in run.init_stacks, or write model.architecture.n_stacks {len(taken)}"
        )
    stacks = dict(enumerate(taken))
    check_fits(source, stacks, rack, "run.init_from")
    if tokenizer.fingerprint != source.tokenizer().fingerprint:
        raise UsageError(
            f"run.init_from {source.run_dir} was trained with another tokenizer; write the tokenizer section of its "
            f"{source.run_dir / CONFIG}, or tokenizer.kind file with the .model in {source.run_dir / TOKENIZER}"
        )
    return Origin(source, stacks)


def adapters_for(config: StackWiseConfig, rack: Rack, plan: Plan) -> Source | None:
    """The run that adapters.load_from names.

    Raises:
        UsageError: there is no such run, it has no adapters, or they fit this rack or the phases not.
    """
    path, key = config.curriculum.adapters.load_from, "curriculum.adapters.load_from"
    if path is None:
        return None
    try:
        source = Source(path)
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from None
    wanted = {adapter_item(a): a for phase in plan.phases for a in phase.adapters}
    if not source.adapters:
        raise UsageError(f"{key} {path}: that run has no adapters; name one that was trained with some")
    if not wanted:
        raise UsageError(f"{key} {path}: no phase here has adapters; write curriculum.trunk adapt")
    there = {adapter.stack for adapter in source.adapters.values()}
    if missing := sorted(there - set(range(len(rack.stacks)))):
        raise UsageError(f"{key} {path}: its adapters sit on stacks {missing}, which this rack does not have")
    check_fits(source, {stack: stack for stack in sorted(there)}, rack, key)
    for item, theirs in source.adapters.items():
        ours = wanted.get(item)
        if ours is None:
            raise UsageError(
                f"{key} {path}: no phase here has its {theirs.name} adapter of stack {theirs.stack}; use the plan that "
                "made it, or put its adapters into its weights (python -m stackwise_jax.convert --merge_adapters) and "
                "start from those with run.init_from"
            )
        if (ours.spec.rank, ours.spec.targets) != (theirs.spec.rank, theirs.spec.targets):
            raise UsageError(
                f"{key} {path}: the {theirs.name} adapter of stack {theirs.stack} has rank {theirs.spec.rank} on "
                f"{', '.join(theirs.spec.targets)} and here rank {ours.spec.rank} on {', '.join(ours.spec.targets)}; "
                "write the adapters section of that run"
            )
    return source
