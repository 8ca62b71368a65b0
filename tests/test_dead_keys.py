"""No dead keys: changing any key of the configuration changes what is built, traced or done, or is refused.

CASES holds for each key the settings under which it matters, another value for it, and an observer: a function of the
configuration that looks at what the program makes of it, not at the configuration. A key without a case fails.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from key_observers import (
    behaviour,
    cache_choice,
    cache_contents,
    devices,
    directory,
    fitting,
    initial_values,
    names,
    paths,
    phases,
    rates,
    refused,
    resting,
    resumed,
    sources,
    steps,
    text,
    tokenizer,
)

from stackwise_jax.config import load_config, validate
from stackwise_jax.config.keys import list_keys, list_names
from stackwise_jax.config.schema import PhaseConfig, StackWiseConfig
from stackwise_jax.data.tokenizers import train_sentencepiece
from stackwise_jax.engine import Run, prepare
from stackwise_jax.errors import UsageError

TINY = {
    "data.source": "synthetic",
    "data.synthetic_tokens": 400,
    "data.seq_len": 8,
    "data.batch_size": 2,
    "model.d_model": 8,
    "model.n_heads": 2,
    "model.d_ff": 8,
    "model.architecture.n_stacks": 2,
    "model.architecture.blocks_per_stack": 1,
    "curriculum.steps": 20,
}
Settings = dict[str, Any]
Observer = Callable[[StackWiseConfig], Any]


def configure(changes: Settings) -> StackWiseConfig:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in changes.items()}
    return load_config(None, [f"--{key}={text}" for key, text in texts.items()])


class Case(NamedTuple):
    value: Any  # another value than the base's
    observe: Observer
    base: Mapping[str, Any] = MappingProxyType({})  # what differs from TINY


RUN = {"curriculum.plan": "rackwise", "model.architecture.n_stacks": 1, "curriculum.steps": 4, "run.tensorboard": False}
RUN |= {"run.sample_tokens": 0, "run.save_every": 1}
END_TO_END = {"curriculum.plan": "rackwise"}
MLM, DIFFUSION = (END_TO_END | {"objective.kind": kind} for kind in ("mlm", "diffusion"))
FILES = {"data.source": "text", "data.path": "a.txt"}
JSONL = {"data.source": "jsonl", "data.path": "a.jsonl"}
PIECES = FILES | {"tokenizer.kind": "file", "tokenizer.path": "a.model"}
TRAINED = FILES | {"tokenizer.kind": "sentencepiece", "tokenizer.vocab_size": 300}
DISK = {"cache.kind": "disk"}
GROUP = {"mesh.num_processes": 2, "mesh.coordinator": "localhost:1234"}
PHASES = [{"path": [0], "train": [0], "train_embed": True}, {"path": [0, 1], "train": [1]}]
CUSTOM = {"curriculum.plan": "custom", "curriculum.phases": PHASES}
FROZEN_LAST = {"curriculum.plan": "custom", "curriculum.phases": [{"train": [0]}]}
FROM = {"run.init_from": "origin"}
PREPEND, GROW = {"curriculum.plan": "prepend"}, {"curriculum.plan": "grow"}
DEPTH = PREPEND | {"objective.kind": "diffusion", "objective.time": "depth"}
INDEPENDENT = {"curriculum.plan": "independent", "objective.kind": "diffusion"}
THREE = {"model.architecture.n_stacks": 3}
ADAPT = {"curriculum.trunk": "adapt"}
PATTERN = ADAPT | THREE | {"curriculum.adapters.strategy": "progressive"}
SIMPLE = ADAPT | THREE | {"curriculum.adapters.rank_pattern": "increasing"}
LATENT, KERNEL = END_TO_END | {"model.attention_type": "mla"}, END_TO_END | {"model.kernel.type": "gaussian"}
TABLE = ADAPT | {"curriculum.adapters.strategy": "variable", "curriculum.adapters.table": [{"rank": 2}, {"rank": 2}]}

CASES = {
    "run.dir": Case("elsewhere", directory),
    "run.name": Case("other", directory),
    "run.seed": Case(1, text),
    "run.init_from": Case("origin", sources),
    "run.init_depth": Case(1, sources, FROM),
    "run.init_stacks": Case([1], sources, FROM),
    "run.resume": Case("never", resumed),
    "run.save_every": Case(0, behaviour, RUN),
    "run.keep": Case(1, behaviour, RUN),
    "run.keep_depths": Case(1, behaviour, RUN | {"curriculum.plan": "append", "model.architecture.n_stacks": 3}),
    "run.eval_every": Case(1, behaviour, RUN),
    "run.eval_batches": Case(1, behaviour, RUN),
    "run.log_every": Case(1, behaviour, RUN),
    "run.max_bad_steps": Case(1, behaviour, RUN),
    "run.tensorboard": Case(True, behaviour, RUN),
    "run.sample_tokens": Case(5, behaviour, RUN),
    "run.sample_prompt": Case("Once", behaviour, RUN | {"run.sample_tokens": 5}),
    "data.source": Case("jsonl", text, {"data.source": "text", "data.path": "lines"}),
    "data.path": Case("b.txt", text, FILES),
    "data.valid_path": Case("b.txt", text, FILES),
    "data.valid_fraction": Case(0.5, text, FILES),
    "data.text_key": Case("other", text, JSONL),
    "data.seq_len": Case(16, text),
    "data.batch_size": Case(4, text),
    "data.packing": Case("chunk", text, FILES),
    "data.shuffle": Case(False, text),
    "data.synthetic_tokens": Case(800, text),
    "tokenizer.kind": Case("bytes", tokenizer, PIECES),
    "tokenizer.vocab_size": Case(290, tokenizer, TRAINED),
    "tokenizer.path": Case("b.model", tokenizer, PIECES),
    "model.d_model": Case(16, steps, END_TO_END),
    "model.n_heads": Case(4, steps, END_TO_END),
    "model.n_kv_heads": Case(1, steps, END_TO_END),
    "model.d_ff": Case(16, steps, END_TO_END),
    "model.vocab_size": Case(300, steps, END_TO_END),
    "model.vocab_multiple": Case(64, steps, END_TO_END),
    "model.attention_preset": Case("efficient_gqa", steps, END_TO_END),
    "model.attention_mode": Case("bidirectional", steps, MLM | {"objective.attention_mode": "model"}),
    "model.attention_type": Case("low_rank", steps, END_TO_END),
    "model.attention_implementation": Case("chunked", steps, END_TO_END),
    "model.mla.rq": Case(3, steps, LATENT),
    "model.mla.rkv": Case(3, steps, LATENT),
    "model.mla.nope_dim": Case(6, steps, LATENT | {"model.mla.rope_dim": 2, "model.mla.v_dim": 4}),
    "model.mla.rope_dim": Case(4, steps, LATENT),
    "model.mla.v_dim": Case(3, steps, LATENT),
    "model.kernel.type": Case("cauchy", steps, END_TO_END),
    "model.kernel.mode": Case("linear", steps, KERNEL),
    "model.kernel.features": Case(64, steps, KERNEL),
    "model.kernel.bandwidth": Case(2.0, steps, KERNEL),
    "model.kernel.learn": Case(True, steps, KERNEL),
    "model.use_rope": Case(False, steps, END_TO_END),
    "model.rope_theta": Case(5000.0, steps, END_TO_END),
    "model.dropout": Case(0.1, steps, END_TO_END),
    "model.freeze_up_proj": Case(False, steps, END_TO_END),
    "model.tie_embeddings": Case(True, steps, END_TO_END),
    "model.norm_eps": Case(1e-5, steps, END_TO_END),
    "model.residual_gain": Case(0.5, steps, END_TO_END),
    "model.spectral_norm": Case(1.0, steps, END_TO_END),
    "model.time_embedding": Case("learned", steps, DIFFUSION | {"objective.time": "input"}),
    "model.init_std": Case(0.05, initial_values),
    "model.param_dtype": Case("bf16", steps, END_TO_END),
    "model.compute_dtype": Case("bf16", steps, END_TO_END),
    "model.quantized_matmul": Case("native", steps, FROZEN_LAST | {"curriculum.frozen": "int8"}),
    "model.remat": Case(True, steps, END_TO_END),
    "model.architecture.n_stacks": Case(3, paths),
    "model.architecture.blocks_per_stack": Case(2, paths),
    "objective.kind": Case("mlm", steps, END_TO_END),
    "objective.mask_fraction": Case(0.5, steps, MLM),
    "objective.noise": Case("elbo", steps, DIFFUSION),
    "objective.min_fraction": Case(0.3, steps, DIFFUSION),
    "objective.max_fraction": Case(0.6, steps, DIFFUSION),
    "objective.schedule": Case("cosine", steps, DIFFUSION),
    "objective.time": Case("input", steps, DIFFUSION),
    "objective.levels": Case([0.8, 0.2], phases, DEPTH),
    "objective.interval_overlap": Case(0.5, phases, INDEPENDENT),
    "objective.corruption": Case("fresh", cache_choice, {"objective.kind": "mlm"}),
    "objective.attention_mode": Case("causal", steps, MLM),
    "curriculum.plan": Case("append", paths),
    "curriculum.steps": Case(21, rates),
    "curriculum.block_size": Case(1, paths, {"curriculum.plan": "blockwise"}),
    "curriculum.frozen": Case("bf16", steps, FROZEN_LAST),
    "curriculum.phases": Case(PHASES[:1], paths, CUSTOM),
    "curriculum.steps_growth": Case(2.0, rates),
    "curriculum.stages": Case([{"steps": 3}], rates),
    "curriculum.frozen_stacks": Case(["fp32", "bf16"], steps, PREPEND),
    "curriculum.stacks_per_stage": Case([2], paths),
    "curriculum.init": Case("copy", phases, GROW),
    "curriculum.overlap": Case(1, paths),
    "curriculum.train_embed": Case("always", paths),
    "curriculum.train_head": Case("first", paths),
    "curriculum.decay": Case("last", rates),
    "curriculum.optimizer_state": Case("reset", phases, GROW),
    "curriculum.trunk": Case("adapt", paths),
    "curriculum.rounds": Case(2, paths, {"curriculum.plan": "cycle"}),
    "curriculum.last_learns": Case(False, paths, THREE | {"curriculum.plan": "keep_last"}),
    "curriculum.learn": Case([0], paths, {"curriculum.plan": "fusion"}),
    "curriculum.consistency": Case(0.5, steps, PREPEND),
    "curriculum.adapters.rank": Case(4, steps, ADAPT),
    "curriculum.adapters.alpha": Case(4.0, phases, ADAPT),
    "curriculum.adapters.trunk_rank": Case(2, steps, ADAPT),
    "curriculum.adapters.trunk_alpha": Case(4.0, phases, ADAPT),
    "curriculum.adapters.dropout": Case(0.1, steps, ADAPT),
    "curriculum.adapters.targets": Case(["q"], steps, ADAPT),
    "curriculum.adapters.strategy": Case("progressive", phases, SIMPLE),
    "curriculum.adapters.rank_pattern": Case("increasing", phases, PATTERN),
    "curriculum.adapters.alpha_pattern": Case("increasing", phases, PATTERN),
    "curriculum.adapters.table": Case([{"rank": 3}, {"rank": 2}], phases, TABLE),
    "curriculum.adapters.lr": Case(1e-4, steps, ADAPT),
    "curriculum.adapters.merge": Case(True, phases, ADAPT | THREE),
    "curriculum.adapters.load_from": Case("adapted", sources, ADAPT),
    "curriculum.budget": Case("60 steps", rates),
    "curriculum.plans": Case([{"plan": "rackwise"}], paths, {"curriculum.steps": 200}),
    "optimizer.name": Case("lion", steps, END_TO_END),
    "optimizer.lr": Case(5e-3, rates),
    "optimizer.schedule": Case("cosine", rates),
    "optimizer.warmup": Case(0.2, rates),
    "optimizer.decay": Case(0.5, rates),
    "optimizer.final_lr": Case(0.5, rates),
    "optimizer.weight_decay": Case(0.2, steps, END_TO_END),
    "optimizer.b1": Case(0.8, steps, END_TO_END),
    "optimizer.b2": Case(0.9, steps, END_TO_END),
    "optimizer.eps": Case(1e-6, steps, END_TO_END),
    "optimizer.grad_clip": Case(2.0, steps, END_TO_END),
    "optimizer.clip": Case("stack", steps, END_TO_END),
    "optimizer.state_dtype": Case("bf16", steps, END_TO_END),
    "optimizer.rounding": Case("stochastic", steps, END_TO_END | {"model.param_dtype": "bf16"}),
    "optimizer.microbatches": Case(2, steps, END_TO_END),
    "cache.kind": Case("recompute", cache_choice),
    "cache.host_budget": Case("600", cache_contents),  # one of three chunks of 512 bytes
    "cache.disk_budget": Case("600", cache_contents, DISK),
    "cache.dir": Case("elsewhere", cache_contents, DISK),
    "cache.read_ahead": Case(3, cache_contents),
    "memory.offload": Case("all", resting),
    "memory.offload_to": Case("disk", resting, {"memory.offload": "all"}),
    "memory.stack_inputs": Case("host", resting, {"memory.offload": "trunk+optimizer"}),
    "memory.finished": Case("frozen", behaviour, RUN | {"curriculum.frozen": "bf16"}),
    "memory.device": Case("1MB", fitting),
    "memory.host": Case("1MB", fitting),
    "memory.disk": Case("1KB", fitting),
    "memory.check": Case("refuse", refused, {"memory.check": "off", "memory.host": "1MB"}),
    "mesh.data": Case(2, devices),
    "mesh.fsdp": Case(2, devices),
    "mesh.coordinator": Case("localhost:4321", devices, GROUP),
    "mesh.num_processes": Case(3, devices, GROUP),
    "mesh.process_id": Case(1, devices, GROUP),
}

# Of an entry of curriculum.phases that trains the second of two stacks.
PHASE_CASES = {
    "path": Case([1], paths),
    "train": Case([0, 1], paths),
    "train_embed": Case(True, paths),
    "train_head": Case(False, paths),
    "name": Case("other", names),
    "steps": Case(3, rates),
    "lr": Case(5e-3, rates),
    "frozen": Case("bf16", steps, {"train": [0]}),
    "objective": Case({"kind": "mlm"}, steps),
    "adapt": Case([0], paths),
    "level": Case(0.5, phases, {"objective": {"kind": "diffusion"}}),
    "optimizer": Case({"name": "lion"}, steps),
    "init": Case("zero", phases),
    "keep_optimizer": Case(True, phases),
    "merge_adapters": Case(True, phases, {"adapt": [0]}),
}


def case_of(key: str) -> tuple[Observer, Settings, Settings]:
    """(observer, settings under which the key matters, the same with another value)."""
    prefix, _, inner = key.partition("[].")
    if not inner:
        case = CASES[key]
        return case.observe, TINY | case.base, TINY | case.base | {key: case.value}
    section, _, name = inner.rpartition(".")
    if section:
        value, observe, base = CASES[inner]
        own = {k.split(".")[1]: v for k, v in base.items() if k.startswith(f"{section}.")}
        before, after = {section: own}, {section: own | {name: value}}
    else:
        value, observe, before = PHASE_CASES[inner]
        after = before | {inner: value}
    custom = lambda entry: TINY | CUSTOM | {prefix: [*PHASES[:-1], PHASES[-1] | entry]}
    return observe, custom(before), custom(after)


KEYS = [key.name for key in list_keys()] + list(list_names(PhaseConfig, "curriculum.phases[]."))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The files that the cases name: text, JSON lines, two SentencePiece models, and two runs."""
    folder = tmp_path_factory.mktemp("files")
    for name, changes in {"origin": {}, "adapted": ADAPT}.items():
        short = {"curriculum.steps": 1, "run.tensorboard": False, "run.eval_batches": 1}
        config = configure(TINY | short | changes)
        Run(prepare(config, folder / name)).train()
    words = np.random.default_rng(0).integers(97, 123, (400, 5)).astype(np.uint8)
    words = [bytes(word).decode() for word in words]
    for name, part in {"a": words[:250], "b": words[250:]}.items():
        paragraphs = [" ".join(part[i : i + 5]) for i in range(0, len(part), 5)]
        (folder / f"{name}.txt").write_text("\n\n".join(paragraphs))
        (folder / f"{name}.model").write_bytes(train_sentencepiece(paragraphs, 300))
    lines = [json.dumps({"text": " ".join(words[i : i + 3]), "other": words[i]}) for i in range(60)]
    for name in ("a.jsonl", "lines"):
        (folder / name).write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def observe(files, tmp_path_factory) -> Callable[[Observer, Settings], Any]:
    """observe(observer, settings): what it sees, from a fresh directory with the files; a refusal is a UsageError."""
    seen: dict[str, Any] = {}

    def look(observer: Observer, settings: Settings, again: bool = False) -> Any:
        known = f"{observer.__name__} {json.dumps(settings, sort_keys=True)}"
        if known not in seen or again:
            folder = tmp_path_factory.mktemp("look")
            shutil.copytree(files, folder, dirs_exist_ok=True)
            config = configure(settings)
            with contextlib.chdir(folder):
                validate(config)
                seen[known] = observer(config)
        return seen[known]

    return look


def test_every_key_has_a_case():
    assert set(CASES) == {key.name for key in list_keys()}
    assert set(PHASE_CASES) == {name for name in list_names(PhaseConfig) if "." not in name}


@pytest.mark.parametrize("key", KEYS)
def test_changing_a_key_changes_something(key, observe):
    observer, before, after = case_of(key)
    assert before != after
    first = observe(observer, before)
    try:
        second = observe(observer, after)
    except UsageError as refusal:
        assert key.split(".")[-1] in str(refusal), f"{key}: refused for another reason: {refusal}"
    else:
        assert first != second, f"{key} is dead: {observer.__name__} sees no difference"


@pytest.mark.parametrize("observer", {case.observe: None for case in CASES.values()}, ids=lambda o: o.__name__)
def test_what_is_observed_depends_on_the_configuration_alone(observer, observe):
    key = next(key for key, case in CASES.items() if case.observe is observer)
    _, settings, _ = case_of(key)
    assert observe(observer, settings) == observe(observer, settings, again=True)
