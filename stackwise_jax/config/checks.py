"""Checks of values that no type catches. What depends on the rack or on the plan is checked where those are built."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from itertools import pairwise
from typing import Literal, cast, get_args

from stackwise_jax.config.bounds import BYTES, check_bounds
from stackwise_jax.config.keys import values_of
from stackwise_jax.config.paths import check_text, check_there
from stackwise_jax.config.schema import (
    AdaptersConfig,
    AdapterTarget,
    CacheConfig,
    CurriculumConfig,
    DataConfig,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PlanConfig,
    RunConfig,
    StackWiseConfig,
    StageConfig,
    TokenizerConfig,
)
from stackwise_jax.config.values import shown
from stackwise_jax.errors import UsageError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**i for i, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}IB": 1024**i for i, letter in enumerate("KMGT", 1)}
# of a budget; B is a billion, as people write tokens
_AMOUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12, "P": 10**15}
DEVICE_NAMES = ("h200", "a100-80", "rtx4090", "t4", "cpu")  # what memory.devices knows
# SentencePiece: 256 pieces for single bytes, five special ones and at least one of text
_SMALLEST_SENTENCEPIECE = 256 + 5 + 1


def validate(config: StackWiseConfig, *, files: bool = True) -> None:
    """Refuse values that no run could use. Keys that mean nothing under the chosen setting are not looked at.

    Args:
        files: whether the files that the configuration names have to be there. False for a stored configuration.

    Raises:
        UsageError: one sentence with the key, its value and what to write instead.
    """
    check_bounds(config)
    for key, value in values_of(config):
        if isinstance(value, float):
            _need(math.isfinite(value), key, value, "a finite number")
        elif isinstance(value, str):
            check_text(value, key)
    _check_run(config.run)
    _check_data(config.data, files)
    _check_tokenizer(config.tokenizer, files)
    _check_model(config.model)
    _check_objective(config.objective, "objective", config)
    _check_curriculum(config.curriculum, config)
    _check_optimizer(config.optimizer, "optimizer", config)
    _check_cache(config.cache)
    _check_memory(config.memory)
    _check_mesh(config.mesh)
    _check_batch(config)


def parse_bytes(text: str, key: str) -> int:
    """Bytes of a size such as "4GiB", "500MB" or "4096"; `key` is named in the error.

    Raises:
        UsageError: the text is no size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f"{key} is {shown(text)}; write a size such as 500MB or 4GiB")
    n_bytes = float(match[1]) * _UNITS[match[2].upper()]
    if n_bytes > BYTES:
        raise UsageError(f"{key} is {shown(text)}; write at most {BYTES // 1024**4}TiB")
    return int(n_bytes)


def parse_budget(text: str) -> tuple[int, Literal["steps", "tokens", "flops"]]:
    """(amount, unit) of curriculum.budget, such as "3000 steps", "5M tokens", "1.5B tokens" or "2e15 flops".

    K, M, B or G, T and P stand for thousands up to 10^15.

    Raises:
        UsageError: the text is no budget, or one of less than 1.
    """
    number = r"([0-9]{1,100}(?:\.[0-9]*)?(?:e\+?[0-9]{1,2})?)"
    match = re.fullmatch(rf"\s*{number}\s*([kmbgtp]?)\s*(step|token|flop)s?\s*", text, re.IGNORECASE)
    amount = int(Decimal(match[1]) * _AMOUNTS[match[2].upper()]) if match else 0
    _need(amount >= 1, "curriculum.budget", text, 'an amount such as "3000 steps", "5M tokens" or "2e15 flops"')
    unit = cast(re.Match, match)[3].lower() + "s"
    return amount, cast(Literal["steps", "tokens", "flops"], unit)


def _need(holds: bool, key: str, value: object, remedy: str) -> None:
    if not holds:
        raise UsageError(f"{key} is {shown(value)}; write {remedy}")


def _at_least(section: object, prefix: str, smallest: int, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _need(value is None or value >= smallest, f"{prefix}.{name}", value, f"at least {smallest}")


def _distinct_ids(ids: list[int], key: str) -> None:
    _need(len(set(ids)) == len(ids) and min(ids, default=0) >= 0, key, ids, "stack ids from 0, each once")


def _check_run(run: RunConfig) -> None:
    _at_least(run, "run", 0, "seed", "save_every", "eval_every", "eval_batches", "sample_tokens")
    _at_least(run, "run", 1, "keep", "keep_depths", "log_every", "max_bad_steps")
    _need(run.seed < 2**32, "run.seed", run.seed, "a number below 2**32")
    _need(run.dir != "", "run.dir", run.dir, "the path of a directory, or null")
    if run.name is not None:
        plain = run.name not in ("", ".", "..") and not re.search(r"[/\\]", run.name)
        _need(plain, "run.name", run.name, "a name without slashes; a path belongs in run.dir")
    _need(run.init_from != "", "run.init_from", run.init_from, "the path of a run directory, or null")
    _at_least(run, "run", 1, "init_depth")
    _distinct_ids(run.init_stacks, "run.init_stacks")
    for key in ("init_depth", "init_stacks"):
        value = getattr(run, key)
        remedy = "nothing there, or the run that they are of in run.init_from"
        _need(not value or run.init_from is not None, f"run.{key}", value, remedy)


def _check_data(data: DataConfig, files: bool) -> None:
    _at_least(data, "data", 2, "seq_len")
    _at_least(data, "data", 1, "batch_size")
    if data.source in ("text", "jsonl"):
        what = "*.txt" if data.source == "text" else "*.jsonl"
        remedy = f"the path of an existing file or of a folder of {what}"
        _need(bool(data.path), "data.path", data.path, remedy)
        if files:
            check_there(str(data.path), "data.path", remedy)
    if files and data.valid_path is not None:
        check_there(data.valid_path, "data.valid_path", "the path of an existing file or of a folder of texts")
    if data.source == "jsonl":
        _need(bool(data.text_key), "data.text_key", data.text_key, "the key of each line that holds its text")
    if data.source == "synthetic":
        _need(
            data.synthetic_tokens >= data.seq_len,
            "data.synthetic_tokens",
            data.synthetic_tokens,
            f"at least data.seq_len ({data.seq_len})",
        )
    if data.valid_path is None:
        _need(0 < data.valid_fraction < 1, "data.valid_fraction", data.valid_fraction, "a share between 0 and 1")


def _check_tokenizer(tokenizer: TokenizerConfig, files: bool) -> None:
    if tokenizer.kind == "sentencepiece":
        _at_least(tokenizer, "tokenizer", _SMALLEST_SENTENCEPIECE, "vocab_size")
    if tokenizer.kind == "file":
        remedy = "the path of an existing SentencePiece .model file"
        _need(bool(tokenizer.path), "tokenizer.path", tokenizer.path, remedy)
        if files:
            check_there(str(tokenizer.path), "tokenizer.path", remedy, folder=False)


def _check_model(model: ModelConfig) -> None:
    _at_least(model, "model", 1, "d_model", "n_heads", "n_kv_heads", "d_ff", "vocab_size", "vocab_multiple")
    _at_least(model.architecture, "model.architecture", 1, "n_stacks", "blocks_per_stack")
    latent = (model.attention_type or model.attention_preset) in ("mla", "mla_attention", "mlgka")
    divides = latent or model.d_model % model.n_heads == 0
    _need(divides, "model.n_heads", model.n_heads, f"a divisor of model.d_model ({model.d_model})")
    if model.n_kv_heads is not None:
        divides = model.n_heads % model.n_kv_heads == 0
        _need(divides, "model.n_kv_heads", model.n_kv_heads, f"a divisor of model.n_heads ({model.n_heads})")
    _check_attention(model, latent)
    if model.use_rope:
        _need(model.rope_theta > 0, "model.rope_theta", model.rope_theta, "a number above 0")
    if model.attention_preset == "custom":
        mode = model.attention_mode
        _need(mode is not None, "model.attention_mode", mode, "bidirectional or causal; the preset custom has no own")
    _need(0 <= model.dropout < 1, "model.dropout", model.dropout, "a share from 0 to below 1")
    _need(model.norm_eps > 0, "model.norm_eps", model.norm_eps, "a number above 0")
    _need(model.init_std > 0, "model.init_std", model.init_std, "a number above 0")
    _need(model.residual_gain > 0, "model.residual_gain", model.residual_gain, "a number above 0")
    _at_least(model, "model", 0, "spectral_norm")


def _check_attention(model: ModelConfig, latent: bool) -> None:
    """Sizes of attention types and kernels; what does nothing under the others is refused where the rack is built."""
    _at_least(model.mla, "model.mla", 1, "rq", "rkv", "nope_dim", "rope_dim", "v_dim")
    _at_least(model.kernel, "model.kernel", 1, "features")
    rope_dim, bandwidth = model.mla.rope_dim, model.kernel.bandwidth
    _need(not rope_dim or rope_dim % 2 == 0, "model.mla.rope_dim", rope_dim, "an even number; rotation needs pairs")
    _need(bandwidth is None or bandwidth > 0, "model.kernel.bandwidth", bandwidth, "a number above 0")
    kernel = model.kernel.type or model.attention_preset in ("kernel_attention", "mlgka")
    if model.use_rope and not latent and not kernel:
        head_dim = model.d_model // model.n_heads
        remedy = f"a number for which model.d_model / model.n_heads is even (it is {head_dim}; rotation needs pairs)"
        _need(head_dim % 2 == 0, "model.n_heads", model.n_heads, remedy)


def _check_objective(objective: ObjectiveConfig, prefix: str, config: StackWiseConfig) -> None:
    """Check one objective section; `prefix` is its name, since phases may have their own."""
    mode, kind = objective.attention_mode, objective.kind
    _need(objective.time == "none" or kind == "diffusion", f"{prefix}.time", objective.time, f"none under {kind}")
    _check_levels(objective, prefix)
    if objective.time == "input" and config.objective.time != "input":
        remedy = "none, or objective.time input, which gives the rack its time embedding"
        _need(False, f"{prefix}.time", objective.time, remedy)
    if objective.kind == "clm":
        # of the presets only gpt_style is causal of itself
        own = config.model.attention_mode or (config.model.attention_preset == "gpt_style" and "causal")
        causal = mode in ("auto", "causal") or (mode == "model" and own == "causal")
        remedy = "auto or causal, since clm would see its own targets"
        _need(causal, f"{prefix}.attention_mode", mode, remedy)
        return
    if objective.kind == "mlm":
        share = objective.mask_fraction
        _need(0 < share < 1, f"{prefix}.mask_fraction", share, "a share between 0 and 1")
    elif objective.noise == "range":
        low, high = objective.min_fraction, objective.max_fraction
        _need(0 <= low <= 1, f"{prefix}.min_fraction", low, "a share from 0 to 1")
        remedy = f"a share from {prefix}.min_fraction ({low}) to 1"
        _need(low <= high <= 1 and high > 0, f"{prefix}.max_fraction", high, remedy)
    if objective.corruption == "fresh":
        kind = config.cache.kind
        remedy = f"auto or recompute, or {prefix}.corruption auto or fixed (a cache needs fixed corruption)"
        _need(kind not in ("host", "disk"), "cache.kind", kind, remedy)


def _check_levels(objective: ObjectiveConfig, prefix: str) -> None:
    """What objective.time depth and the plan independent ask for."""
    _at_least(objective, prefix, 0, "interval_overlap")
    levels, key = objective.levels, f"{prefix}.levels"
    _need(not levels or objective.time == "depth", key, levels, f"nothing there, or {prefix}.time depth")
    fit = all(0 < level <= 1 for level in levels) and all(a >= b for a, b in pairwise(levels))
    _need(fit, key, levels, "shares above 0 and up to 1 that do not rise, from the input on")
    if objective.time == "depth" and not levels:
        low = objective.min_fraction
        _need(0 < low <= 1, f"{prefix}.min_fraction", low, "a share above 0, the level of the last stack")
        high = objective.max_fraction
        _need(low <= high <= 1, f"{prefix}.max_fraction", high, f"a share from {prefix}.min_fraction ({low}) to 1")


def _check_curriculum(curriculum: CurriculumConfig, config: StackWiseConfig) -> None:
    _check_plan(curriculum, "curriculum", config)
    if curriculum.budget is not None:
        parse_budget(curriculum.budget)
    for i, entry in enumerate(curriculum.plans):
        prefix = f"curriculum.plans[{i}]"
        _check_plan(entry, prefix, config)
        _need(entry.share > 0, f"{prefix}.share", entry.share, "a number above 0")


def _check_plan(plan: PlanConfig, prefix: str, config: StackWiseConfig) -> None:
    """Check one plan with its arguments; `prefix` is the name of its section."""
    _at_least(plan, prefix, 1, "steps", "rounds")
    _at_least(plan, prefix, 0, "overlap", "consistency")
    _need(plan.steps_growth > 0, f"{prefix}.steps_growth", plan.steps_growth, "a number above 0")
    sizes = plan.stacks_per_stage
    fit = bool(sizes) and min(sizes) >= 1
    _need(fit, f"{prefix}.stacks_per_stage", sizes, "a list of numbers from 1, such as [1] or [2, 1]")
    _distinct_ids(plan.learn, f"{prefix}.learn")
    if plan.plan == "blockwise":
        _at_least(plan, prefix, 1, "block_size")
    _check_adapters(plan.adapters, f"{prefix}.adapters")
    key, entries = ("phases", plan.phases) if plan.plan == "custom" else ("stages", plan.stages)
    for i, entry in enumerate(entries):
        _check_stage(entry, f"{prefix}.{key}[{i}]", config)


def _check_stage(stage: StageConfig, prefix: str, config: StackWiseConfig) -> None:
    _at_least(stage, prefix, 1, "steps")
    _need(stage.lr is None or stage.lr > 0, f"{prefix}.lr", stage.lr, "a number above 0")
    _need(stage.level is None or 0 < stage.level <= 1, f"{prefix}.level", stage.level, "a share above 0 and up to 1")
    if stage.objective is not None:
        _check_objective(stage.objective, f"{prefix}.objective", config)
    if stage.optimizer is not None:
        _check_optimizer(stage.optimizer, f"{prefix}.optimizer", config)


def _check_adapters(adapters: AdaptersConfig, prefix: str) -> None:
    _at_least(adapters, prefix, 0, "rank", "trunk_rank")
    for name in ("alpha", "trunk_alpha"):
        _need(getattr(adapters, name) > 0, f"{prefix}.{name}", getattr(adapters, name), "a number above 0")
    _need(0 <= adapters.dropout < 1, f"{prefix}.dropout", adapters.dropout, "a share from 0 to below 1")
    targets = adapters.targets
    fit = bool(targets) and len(set(targets)) == len(targets)
    _need(fit, f"{prefix}.targets", targets, f"at least one of {', '.join(get_args(AdapterTarget))}, each once")
    _need(adapters.lr is None or adapters.lr > 0, f"{prefix}.lr", adapters.lr, "a number above 0, or null")
    _need(adapters.load_from != "", f"{prefix}.load_from", adapters.load_from, "the path of a run directory, or null")
    for i, row in enumerate(adapters.table):
        _at_least(row, f"{prefix}.table[{i}]", 0, "rank")
        _need(row.alpha > 0, f"{prefix}.table[{i}].alpha", row.alpha, "a number above 0")


def _check_optimizer(optimizer: OptimizerConfig, prefix: str, config: StackWiseConfig) -> None:
    """Check one optimizer section; `prefix` is its name, since phases may have their own."""
    _at_least(optimizer, prefix, 0, "weight_decay", "grad_clip")
    _at_least(optimizer, prefix, 1, "microbatches")
    _need(optimizer.lr > 0, f"{prefix}.lr", optimizer.lr, "a number above 0")
    _need(optimizer.eps > 0, f"{prefix}.eps", optimizer.eps, "a number above 0")
    for name in ("warmup", "decay", "final_lr"):
        value = getattr(optimizer, name)
        _need(0 <= value <= 1, f"{prefix}.{name}", value, "a share from 0 to 1")
    for name in ("b1", "b2"):
        value = getattr(optimizer, name)
        _need(0 <= value < 1, f"{prefix}.{name}", value, "a number from 0 to below 1")
    if optimizer.schedule == "wsd":
        remedy = f"at most 1 minus {prefix}.warmup ({optimizer.warmup}), since both are shares of one phase"
        _need(optimizer.warmup + optimizer.decay <= 1, f"{prefix}.decay", optimizer.decay, remedy)
    name, dtype = optimizer.name, optimizer.state_dtype
    kept = dtype is None or name not in ("adafactor", "adamw8bit")
    _need(kept, f"{prefix}.state_dtype", dtype, f"null, since {name} has no momentum whose dtype could be chosen")
    needless = optimizer.rounding == "stochastic" and config.model.param_dtype != "bf16"
    remedy = "nearest, or model.param_dtype bf16 (fp32 weights take small updates as they are)"
    _need(not needless, f"{prefix}.rounding", optimizer.rounding, remedy)
    size, parts = config.data.batch_size, optimizer.microbatches
    _need(size % parts == 0, "data.batch_size", size, f"a multiple of {prefix}.microbatches ({parts})")


def _check_cache(cache: CacheConfig) -> None:
    parse_bytes(cache.host_budget, "cache.host_budget")
    parse_bytes(cache.disk_budget, "cache.disk_budget")
    _at_least(cache, "cache", 1, "read_ahead")


def _check_memory(memory: MemoryConfig) -> None:
    for name in ("device", "host", "disk"):
        text = getattr(memory, name)
        if text is None or (name == "device" and text in DEVICE_NAMES):
            continue
        try:
            parse_bytes(text, f"memory.{name}")
        except UsageError:
            names = f"one of {', '.join(DEVICE_NAMES)}, or " if name == "device" else ""
            _need(False, f"memory.{name}", text, f"{names}a size such as 40GB or 128GiB")


def _check_mesh(mesh: MeshConfig) -> None:
    _need(mesh.data == -1 or mesh.data >= 1, "mesh.data", mesh.data, "at least 1, or -1 for all devices")
    _at_least(mesh, "mesh", 1, "fsdp", "num_processes")
    if mesh.num_processes > 1:
        address = re.fullmatch(r"[^\s/]+:([0-9]{1,5})", mesh.coordinator or "")
        good = address is not None and 1 <= int(address[1]) < 2**16
        remedy = "host:port of process 0, since mesh.num_processes is more than 1"
        _need(good, "mesh.coordinator", mesh.coordinator, remedy)
    in_range = 0 <= mesh.process_id < mesh.num_processes
    remedy = f"a number from 0 to {mesh.num_processes - 1}, since mesh.num_processes is {mesh.num_processes}"
    _need(in_range, "mesh.process_id", mesh.process_id, remedy)


def _check_batch(config: StackWiseConfig) -> None:
    """The batch is spread over the devices of the mesh."""
    size = config.data.batch_size
    devices = max(config.mesh.data, 1) * config.mesh.fsdp
    _need(size % devices == 0, "data.batch_size", size, f"a multiple of mesh.data * mesh.fsdp ({devices} devices)")
