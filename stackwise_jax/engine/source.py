"""A run as a source of weights: the items of its rack, as it ended or as it was at a depth, loaded one by one."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from stackwise_jax.adapters import merge_adapters
from stackwise_jax.checkpoint import Progress, Store, check_goes_on
from stackwise_jax.config import StackWiseConfig
from stackwise_jax.curriculum import AdapterSpec, Phase, Plan, StackAdapter, make_plan, trained_apart
from stackwise_jax.data import Tokenizer, load_tokenizer
from stackwise_jax.engine.directory import CHECKPOINTS, CONFIG, TOKENIZER, check_unchanged, read_config, read_rack
from stackwise_jax.engine.shape import rack_shape
from stackwise_jax.engine.weights import EMBED, HEAD, adapter_item, item_shapes, stack_item
from stackwise_jax.errors import UsageError
from stackwise_jax.memory.quantized import QUANTIZED, to_format
from stackwise_jax.model import Block, Rack

log = logging.getLogger(__name__)

Tree = Any
# What of a block does not change the meaning of its weights.
FREE_KEYS = frozenset({"attention_mode", "dropout", "freeze_up_proj", "param_dtype", "compute_dtype"})
FREE_KEYS |= {"attention_implementation", "kernel.learn"}


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
        progress = self.store.hold()  # while this is a source, a trainer beside it removes nothing that it may read
        if progress is None:
            raise UsageError(f"{run_dir} holds no checkpoint yet; let train reach its first save")
        self.progress: Progress = progress
        self.rack: Rack = read_rack(self.run_dir)
        self.plan: Plan = make_plan(self.config, rack_shape(self.rack, self.config.data))
        check_goes_on(progress, len(self.plan.phases), self.run_dir)
        self._choose(depth, expert)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run. Raises UsageError when it is not the one that the run was trained with."""
        tokenizer = load_tokenizer(self.config.tokenizer, None, self.run_dir / TOKENIZER)
        check_unchanged(self.run_dir, self.progress, {"tokenizer": tokenizer.fingerprint})
        return tokenizer

    def saved_format(self, item: str) -> str:
        """The format in which an item lies in the store."""
        return self.store.item_meta(item, self.versions[item]).get("format", self.rack.param_dtype)

    def load(self, item: str, like: Tree = None) -> Tree:
        """One item.

        Args:
            like: a dense tree as in Store.load_item; what was saved quantized is dequantized. None: numpy arrays, in
                the format in which it was saved.
        """
        saved = self.saved_format(item)
        if saved not in QUANTIZED:
            return self.store.load_item(item, self.versions[item], like)
        tree = self.store.load_item(item, self.versions[item], item_shapes(self.rack, item, saved, self.adapters))
        return tree if like is None else _dense(tree, like)

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
            kept = [result for result in progress.results if "versions" in result]  # see run.keep_depths
            at_depth = [r for r in kept if len(phases[r["index"]].path) == depth]
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
        """The phases whose ends are the models of the run: one, or the denoisers of intervals of noise of their own.

        Denoisers share no stack and the noise falls from one to the next. Of other models that share no stack the last
        one counts.

        Raises:
            UsageError: some of the denoisers have not been trained yet.
        """
        apart = trained_apart(self.plan.phases)
        if len(apart) == 1:
            return [self.index]
        ended = {result["index"] for result in self.progress.results}
        if missing := [self.plan.phases[index].name for index in apart if index not in ended]:
            raise UsageError(
                f"{self.run_dir} has not yet trained all of its {len(apart)} denoisers ({', '.join(missing)} to come); "
                "let train reach its end"
            )
        return apart


def _ended(result: dict) -> tuple[dict, dict, int]:
    return result["versions"], result["formats"], result["index"]


_merge = jax.jit(merge_adapters)


def _dense(tree: Tree, like: Tree) -> Tree:
    """A quantized tree in full precision, with the dtypes and shardings of `like`."""

    def dequantized(tree: Tree) -> Tree:
        return jax.tree.map(lambda x, target: x.astype(target.dtype), to_format(tree, "fp32"), like)

    return jax.jit(dequantized, out_shardings=jax.tree.map(lambda x: x.sharding, like))(tree)


def check_fits(source: Source, stacks: dict[int, int], rack: Rack, key: str) -> None:
    """Refuse a rack that cannot take the stacks of another run.

    Args:
        stacks: stack of `rack` -> stack of the source.
        key: the key that names the source.

    Raises:
        UsageError: the first thing that differs, with both values.
    """
    where = f"{key} {source.run_dir}"
    for name in ("d_model", "vocab_size", "tie_embeddings"):
        ours, theirs = getattr(rack, name), getattr(source.rack, name)
        if ours != theirs:
            raise UsageError(
                f"{where}: its {name} is {theirs} and here it is {ours}; write model.{name} as in that run"
            )
    for ours, theirs in stacks.items():
        new, old = rack.stacks[ours].blocks, source.rack.stacks[theirs].blocks
        if len(new) != len(old):
            raise UsageError(
                f"{where}: its stack {theirs} has {len(old)} blocks and stack {ours} here has {len(new)}; write "
                f"model.architecture.blocks_per_stack {len(old)}"
            )
        for a, b in zip(new, old, strict=True):
            here, there = _keys(a), _keys(b)
            if name := next((name for name in there | here if there.get(name) != here.get(name)), None):
                raise UsageError(
                    f"{where}: {name} of its stack {theirs} is {there.get(name)} and of stack {ours} here "
                    f"{here.get(name)}; write model.{name} {there.get(name)}"
                )


def _keys(block: Block) -> dict[str, Any]:
    """What gives the weights of a block their meaning, by the names of its keys."""
    fields = [f.name for f in dataclasses.fields(block) if f.name not in ("parent", "name")]
    found: dict[str, Any] = {}
    for name in fields:
        value = getattr(block, name)
        nested = vars(value) if name in ("mla", "kernel") and value is not None else None
        found |= {name: value} if nested is None else {f"{name}.{key}": inner for key, inner in nested.items()}
    return {name: value for name, value in found.items() if name not in FREE_KEYS}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the first weights of a run come from.

    stacks: stack of the run -> stack of the source. merge: the source's adapters go into the weights; not where they
    are taken over as adapters.
    """

    source: Source
    stacks: dict[int, int]
    merge: bool = True

    def load(self, item: str, like: Tree) -> Tree | None:
        """An item of the new run in full precision; None: the source does not have it."""
        if item == EMBED:
            return self._embedding(like)
        if item == HEAD:
            return self.source.load(item, like)
        stack = self.stacks.get(int(item.split("/")[1]))
        if stack is None:
            return None
        return self.source.load_merged(stack, like) if self.merge else self.source.load(stack_item(stack), like)

    def _embedding(self, like: Tree) -> Tree:
        """The embedding; a time embedding that this rack has and the source has not, or another, begins at zero."""
        there = self.source.store.item_shapes(EMBED, self.source.versions[EMBED])
        kept = {name: like[name] for name in like if name != "time"}
        if alike := jax.tree.map(lambda x: x.shape, there.get("time")) == jax.tree.map(
            lambda x: x.shape, like.get("time")
        ):
            kept = like
        unused = {"time": there["time"]} if "time" in there and not alike else {}
        tree = self.source.load(EMBED, kept | unused)
        zeros = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), like)
        return {name: tree[name] if name in kept else zeros[name] for name in like}


def saved_items(run_dir: Path) -> dict[str, int]:
    """The items that a run has saved so far: what it no longer takes from another run. Empty where none was begun."""
    progress = Store(run_dir / CHECKPOINTS).latest()
    return progress.versions if progress is not None else {}


def origin_for(config: StackWiseConfig, rack: Rack, tokenizer: Tokenizer, saved: dict[str, int]) -> Origin | None:
    """What run.init_from, init_depth and init_stacks name; None also where the run has its weights already.

    Raises:
        UsageError: there is no such run, depth or stack, or it fits this rack or tokenizer not.
    """
    run = config.run
    if run.init_from is None or saved:
        return None
    try:
        source = Source(run.init_from, run.init_depth)
    except UsageError as error:
        raise UsageError(f"run.init_from, init_depth: {str(error).replace('--depth', 'run.init_depth')}") from None
    if unknown := sorted(set(run.init_stacks) - set(source.path)):
        raise UsageError(f"run.init_stacks names {unknown}; {source.run_dir} has the stacks {list(source.path)}")
    if len(source.experts) > 1:
        raise UsageError(
            f"run.init_from {source.run_dir} holds {len(source.experts)} denoisers that were trained apart; name a run "
            "that ended as one model"
        )
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
    quantized = {source.saved_format(stack_item(stack)) for stack in taken} & set(QUANTIZED)
    if quantized:
        kinds = ", ".join(sorted(quantized))
        log.warning("run.init_from %s: its stacks were kept in %s only; they begin rounded to it", run.init_from, kinds)
    load_from = config.curriculum.adapters.load_from
    if load_from is None or Path(load_from).absolute() != source.run_dir.absolute():
        return Origin(source, stacks)
    if any(ours != theirs for ours, theirs in stacks.items()):
        raise UsageError(
            f"run.init_from and curriculum.adapters.load_from are both {source.run_dir}, and run.init_stacks puts its "
            "stacks elsewhere than its adapters; leave one of the three out"
        )
    return Origin(source, stacks, merge=False)


def _shown(spec: AdapterSpec) -> str:
    return f"rank {spec.rank}, alpha {spec.alpha:g}, dropout {spec.dropout:g} on {', '.join(spec.targets)}"


def adapters_for(config: StackWiseConfig, rack: Rack, plan: Plan, saved: dict[str, int]) -> Source | None:
    """The run that adapters.load_from names; None also where the run has all adapters already.

    Raises:
        UsageError: there is no such run, it has no adapters, or they fit this rack or the phases not.
    """
    path, key = config.curriculum.adapters.load_from, "curriculum.adapters.load_from"
    wanted = {adapter_item(a): a for phase in plan.phases for a in phase.adapters}
    if path is None or (wanted and saved.keys() >= wanted.keys()):
        return None
    try:
        source = Source(path)
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from None
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
        if ours.spec != theirs.spec:
            shown = lambda spec: (
                f"rank {spec.rank}, alpha {spec.alpha:g}, dropout {spec.dropout:g} on {list(spec.targets)}"
            )
            raise UsageError(
                f"{key} {path}: the {theirs.name} adapter of stack {theirs.stack} has {shown(theirs.spec)} and here "
                f"{shown(ours.spec)}; write the adapters section of that run"
            )
    return source
