"""What the user wrote and something else wins over: keys that have no effect under the setting that was chosen.

The tables say under which values a key has an effect. Keys of which the rack or the plan refuses another value than the
default are named here only where they repeat it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from stackwise_jax.config import Written
from stackwise_jax.config.keys import value_of
from stackwise_jax.config.schema import (
    AdaptersConfig,
    CurriculumConfig,
    DataConfig,
    ObjectiveConfig,
    PhaseConfig,
    PlanConfig,
    StackWiseConfig,
    StageConfig,
)
from stackwise_jax.config.values import shown
from stackwise_jax.curriculum.phase import Phase
from stackwise_jax.curriculum.plans import EVERY_PLAN, PLANS, config_shape
from stackwise_jax.errors import UsageError


class Rule(NamedTuple):
    """Keys of a section, the key on whose value it depends whether they have an effect, and under which values."""

    keys: str  # separated by spaces
    under: str
    works: Callable[[Any], bool]


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _none_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value not in values


_RUN = (
    Rule("run.name", "run.dir", _one_of(None)),
    Rule("run.sample_prompt", "run.sample_tokens", _none_of(0)),
    Rule("data.valid_fraction", "data.valid_path", _one_of(None)),
    Rule("data.synthetic_tokens", "data.source", _one_of("synthetic")),
    Rule("tokenizer.vocab_size", "tokenizer.kind", _one_of("sentencepiece")),
    Rule("tokenizer.path", "tokenizer.kind", _one_of("file")),
    Rule("model.vocab_multiple", "model.vocab_size", _one_of(None)),
    Rule("model.rope_theta", "model.use_rope", _one_of(True)),
    Rule("model.time_embedding", "objective.time", _one_of("input")),
    Rule("cache.host_budget", "cache.kind", _none_of("recompute", "disk")),
    Rule("cache.disk_budget cache.dir cache.read_ahead", "cache.kind", _none_of("recompute")),
    Rule("memory.offload_to memory.stack_inputs", "memory.offload", _none_of("none")),
    Rule("mesh.coordinator", "mesh.num_processes", _none_of(1)),
)
_OBJECTIVE = (
    Rule("mask_fraction", "kind", _one_of("mlm")),
    Rule("noise min_fraction max_fraction schedule", "kind", _one_of("diffusion")),
    Rule("corruption", "kind", _none_of("clm")),
    Rule("min_fraction max_fraction", "levels", _one_of([])),
)
_OPTIMIZER = (
    Rule("decay", "schedule", _one_of("wsd")),
    Rule("final_lr", "schedule", _none_of("constant")),
    Rule("b1", "name", _none_of("adafactor")),
    Rule("b2", "name", _none_of("adafactor", "sgd")),
    Rule("eps", "name", _one_of("adamw", "adamw8bit", "muon")),
    Rule("clip", "grad_clip", _none_of(0.0)),
)
_ADAPTERS = (
    Rule("rank_pattern alpha_pattern", "strategy", _one_of("progressive")),
    Rule("table", "strategy", _one_of("variable")),
    Rule("rank alpha", "strategy", _none_of("variable")),
    Rule("alpha", "rank", _none_of(0)),
    Rule("trunk_alpha", "trunk_rank", _none_of(0)),
)
_NO_PREFIX = ("rackwise", "prepend", "grow", "independent", "joint")  # plans in which nothing comes before what learns


def overruled(config: StackWiseConfig, written: Written, *, alone: bool = False) -> list[str]:
    """One line for each key that was written and that something else wins over, after the notes of `written`.

    Args:
        alone: what is done looks at the devices of this process only (a plan, a dry run).
    """
    found: dict[str, str] = {}
    for key, why in _without_effect(config, alone):
        if key in written.keys and key not in found and value_of(config, key) is not None:
            found[key] = f"{key} has no effect {why}"
    twice = [
        f"{key} is written more than once on the command line; the last one, {shown(text)}, counts"
        for key, text in written.repeated.items()
    ]
    return written.notes + twice + _replaced(written) + _attention(config, written) + list(found.values())


def _replaced(written: Written) -> list[str]:
    """A line for each file some of whose values a later file or the command line replaces."""
    lines = []
    for (winner, loser), keys in written.replaced.items():
        counts = [f"{key} {_briefly(now)}" for key, (now, _) in keys.items()]
        others = [_briefly(before) for _, before in keys.values()]
        verb = "counts" if len(keys) == 1 else "count"
        lines.append(f"{_and(counts)} of {winner} {verb}, not {_and(others)} of {loser}")
    return lines


def _briefly(value: Any) -> str:
    if isinstance(value, list) and any(map(dataclasses.is_dataclass, value)):
        return f"with {len(value)} {'entry' if len(value) == 1 else 'entries'}"
    return value if isinstance(value, str) and value.isprintable() and len(value) < 100 else shown(value)


def _and(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def _without_effect(config: StackWiseConfig, alone: bool) -> Iterator[tuple[str, str]]:
    """(key, why it has no effect), whether it was written or not."""
    yield from _by_rules(_RUN, config, "")
    yield from _by_rules(_OBJECTIVE, config.objective, "objective.")
    yield from _by_rules(_OPTIMIZER, config.optimizer, "optimizer.")
    yield from _noise_range(config.objective, "objective.")
    model, curriculum = config.model, config.curriculum
    yield from _of_data(config.data)
    if model.kernel.type is None and model.attention_preset not in ("kernel_attention", "mlgka"):
        for name in ("mode", "features", "bandwidth", "learn"):
            yield f"model.kernel.{name}", "without model.kernel.type"
    plans = {f"curriculum.plans[{i}].": plan for i, plan in enumerate(curriculum.plans)} or {"curriculum.": curriculum}
    if curriculum.plans:
        names = (key.name for key in dataclasses.fields(PlanConfig))
        yield from ((key, "beside curriculum.plans") for name in names for key in _inner(name, "curriculum."))
    phases = {prefix: _phases(plan, config) for prefix, plan in plans.items()}
    for prefix, plan in plans.items():
        yield from _of_plan(plan, prefix, config, len(phases[prefix]))
    if all(_each_has(("lr", "optimizer"), plan, len(phases[prefix])) for prefix, plan in plans.items()):
        yield "optimizer.lr", "beside the lr or optimizer of each entry of stages or phases"
    if config.objective.time == "depth" and all(map(_has_levels, plans.values(), phases.values())):
        yield "objective.noise", "under objective.time depth, where each phase has the level of its stacks"
        if config.objective.levels:
            yield "objective.schedule", f"under objective.levels {shown(config.objective.levels)}"
    if not {"int8", "fp8"} & set().union(*map(_formats, plans.values())):
        yield "model.quantized_matmul", "without a format int8 or fp8 in curriculum.frozen"
    if all(plan.plan in _NO_PREFIX for plan in plans.values()):
        for name in ("kind", "host_budget", "disk_budget", "dir", "read_ahead"):
            yield f"cache.{name}", f"under curriculum.plan {curriculum.title}, which has no frozen prefix to cache"
    if config.memory.check == "off" and not alone:
        yield from ((f"memory.{name}", "under memory.check off") for name in ("device", "host", "disk"))
    if alone and config.mesh.num_processes > 1:
        yield "mesh.num_processes", "here: a plan looks at the devices of one process"


def _of_data(data: DataConfig) -> Iterator[tuple[str, str]]:
    """Keys on which the names of the files decide."""
    paths = {key: str(path) for key in ("path", "valid_path") if (path := getattr(data, key)) is not None}
    other = {"jsonl": ".txt", "text": ".jsonl"}.get(data.source)
    for key, path in paths.items():
        if other and path.endswith(other):
            yield "data.source", f"on data.{key} {shown(path)}, whose name ends in {other}"
    is_jsonl = [path.endswith(".jsonl") or (other == ".txt" and not path.endswith(other)) for path in paths.values()]
    if not any(is_jsonl):
        yield "data.text_key", "without a file of jsonl" if other else f"under data.source {data.source}"


def _phases(plan: PlanConfig, config: StackWiseConfig) -> Sequence[Phase | PhaseConfig]:
    """The phases of a plan before their own settings, where a rule asks for them; none where it cannot be made, which
    is said later."""
    if plan.plan == "custom":
        return plan.phases
    if not plan.stages and config.objective.time != "depth":
        return ()
    keys = {key.name: getattr(plan, key.name) for key in dataclasses.fields(PlanConfig)}
    config = dataclasses.replace(config, curriculum=CurriculumConfig(**keys))
    try:
        return PLANS[plan.plan].make(config_shape(config), config).phases
    except UsageError:
        return ()


def _entries(plan: PlanConfig) -> Sequence[StageConfig]:
    return plan.phases if plan.plan == "custom" else plan.stages


def _each_has(names: Sequence[str], plan: PlanConfig, n_phases: int) -> bool:
    """Whether each phase of a plan has an entry with one of these keys."""
    entries = _entries(plan)
    return 0 < n_phases <= len(entries) and all(
        any(getattr(entry, name) is not None for name in names) for entry in entries
    )


def _has_levels(plan: PlanConfig, phases: Sequence[Phase | PhaseConfig]) -> bool:
    """Whether under objective.time depth each phase works at one level: that of its new stacks, where more follow."""
    return PLANS[plan.plan].noise == "stage" and len(phases) > 1 and set(phases[0].path) < set(phases[-1].path)


def _of_plan(plan: PlanConfig, prefix: str, config: StackWiseConfig, n_phases: int) -> Iterator[tuple[str, str]]:
    """Keys of a plan, of its adapters and of its entries."""
    used = PLANS[plan.plan].keys | EVERY_PLAN
    for key in dataclasses.fields(PlanConfig):
        if key.name not in used:
            yield from ((name, f"under {prefix}plan {plan.plan}") for name in _inner(key.name, prefix))
    if "trunk" in used and plan.trunk == "frozen":
        yield from ((name, f"under {prefix}trunk frozen") for name in _inner("adapters", prefix))
    yield from _by_rules(_ADAPTERS, plan.adapters, f"{prefix}adapters.")
    key, entries = "phases" if plan.plan == "custom" else "stages", _entries(plan)
    formats = ("frozen", "frozen_stacks")
    if plan.plan in ("rackwise", "grow"):
        yield from (
            (f"{prefix}{name}", f"under {prefix}plan {plan.plan}, in which everything learns") for name in formats
        )
    if _each_has(("frozen",), plan, n_phases):
        yield from ((f"{prefix}{name}", f"beside the frozen of each entry of {key}") for name in formats)
    if plan.frozen_stacks:
        yield f"{prefix}frozen", f"on stacks under {prefix}frozen_stacks, only on embedding and head"
    if config.optimizer.schedule == "constant":
        yield f"{prefix}decay", "under optimizer.schedule constant"
    if config.curriculum.budget is not None and all(entry.steps is None for entry in entries):
        yield f"{prefix}steps", f"under curriculum.budget {config.curriculum.budget}"
    if _each_has(("steps",), plan, n_phases):
        for name in ("steps", "steps_growth"):
            yield f"{prefix}{name}", f"beside the steps of each entry of {key}"
    for i, entry in enumerate(entries):
        yield from _of_entry(entry, f"{prefix}{key}[{i}].")


def _of_entry(entry: StageConfig, prefix: str) -> Iterator[tuple[str, str]]:
    """Keys of one entry of stages or phases."""
    if entry.lr is not None:
        yield f"{prefix}optimizer.lr", f"under {prefix}lr {entry.lr:g}"
    if entry.level is not None:
        for name in ("noise", "min_fraction", "max_fraction", "schedule"):
            yield f"{prefix}objective.{name}", f"under {prefix}level {entry.level:g}"
    if entry.objective is not None:
        yield from _by_rules(_OBJECTIVE, entry.objective, f"{prefix}objective.")
        yield from _noise_range(entry.objective, f"{prefix}objective.")
    if entry.optimizer is not None:
        yield from _by_rules(_OPTIMIZER, entry.optimizer, f"{prefix}optimizer.")


def _noise_range(objective: ObjectiveConfig, prefix: str) -> Iterator[tuple[str, str]]:
    """The range of the noise, which the bound does not look at; levels by depth do."""
    if objective.noise == "elbo" and objective.time != "depth":
        for name in ("min_fraction", "max_fraction"):
            yield f"{prefix}{name}", f"under {prefix}noise elbo"


def _by_rules(rules: tuple[Rule, ...], section: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for rule in rules:
        value = value_of(section, rule.under)
        if not rule.works(value):
            text = value if isinstance(value, str) else shown(value)
            yield from ((f"{prefix}{key}", f"under {prefix}{rule.under} {text}") for key in rule.keys.split())


def _attention(config: StackWiseConfig, written: Written) -> list[str]:
    """The line on the way that blocks look, where the model says one and the objectives train with another."""
    model, curriculum = config.model, config.curriculum
    key, value, own = "model.attention_mode", model.attention_mode, model.attention_mode
    if own is None and model.attention_preset != "custom":
        key, value = "model.attention_preset", model.attention_preset
        own = "causal" if value == "gpt_style" else "bidirectional"  # of the presets only gpt_style is causal
    plans = curriculum.plans or [curriculum]
    entries = [entry for plan in plans for entry in _entries(plan)]
    objectives = [entry.objective or config.objective for entry in entries]
    if any(plan.plan != "custom" for plan in plans):
        objectives.append(config.objective)
    modes = {_mode(objective): objective for objective in objectives}
    if key not in written.keys or own is None or "model" in modes or set(modes) <= {own}:
        return []
    mode, objective = next((mode, objective) for mode, objective in modes.items() if mode != own)
    return [
        f"{key} {value} means {own} attention, and objective.kind {objective.kind} trains with {mode} attention; "
        f"objective.attention_mode {objective.attention_mode} decides"
        + ("" if own == "causal" else ", and mlm or diffusion go with bidirectional attention")
    ]


def _mode(objective: ObjectiveConfig) -> str:
    if objective.attention_mode != "auto":
        return objective.attention_mode
    return "causal" if objective.kind == "clm" else "bidirectional"


def _formats(plan: PlanConfig) -> set[str | None]:
    """The formats in which a plan may store weights that do not learn."""
    entries = [*plan.stages, *plan.phases]
    return {plan.frozen, *plan.frozen_stacks, *(entry.frozen for entry in entries)}


def _inner(name: str, prefix: str) -> list[str]:
    """The names of the keys that a key of a plan stands for: itself, or those of its section."""
    if name != "adapters":
        return [f"{prefix}{name}"]
    # what it loads is looked at in every plan that has adapters
    return [f"{prefix}adapters.{key.name}" for key in dataclasses.fields(AdaptersConfig) if key.name != "load_from"]
