"""A run's setup without its text: enough to plan. Nothing is read but the configuration.

What a plan needs of the text is the size of the vocabulary and how many batches there are. Without the text the
vocabulary is the one that is written, and there are as many batches as the longest phase visits.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stackwise_jax.config import StackWiseConfig, validate
from stackwise_jax.curriculum import make_plan
from stackwise_jax.data import Dataset, load_tokenizer
from stackwise_jax.engine.description import ADAPTERS, check_files
from stackwise_jax.engine.setup import Setup, prepare, start_devices
from stackwise_jax.engine.shape import rack_shape
from stackwise_jax.engine.source import Source, saved_items
from stackwise_jax.errors import UsageError
from stackwise_jax.model import create_rack_from_config, padded_vocab, regroup

BUILT_IN = ("python-docs", "synthetic")


@dataclass(frozen=True)
class NoTokenizer:
    """The size of a tokenizer that is not made yet."""

    vocab_size: int
    special_ids: tuple[int, ...] = (0, 1, 2, 3)
    unk_id: int | None = None
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    mask_id: int = 3


def known_text(config: StackWiseConfig) -> bool:
    """Whether text and tokenizer are at hand and quickly read."""
    return config.data.source in BUILT_IN and config.tokenizer.kind != "sentencepiece"


def without_text(config: StackWiseConfig) -> StackWiseConfig:
    """The configuration with a built-in text and the byte tokenizer: what can be checked before the text is there."""
    if known_text(config):
        return config
    data = dataclasses.replace(config.data, source="synthetic", path=None, valid_path=None)
    data = dataclasses.replace(data, synthetic_tokens=max(data.synthetic_tokens, data.seq_len))
    return dataclasses.replace(config, data=data, tokenizer=dataclasses.replace(config.tokenizer, kind="bytes"))


def sketch(config: StackWiseConfig, run_dir: Path) -> Setup:
    """The setup of a run as far as memory and time depend on it; with the text where it is built in.

    Raises:
        UsageError: the configuration cannot be run.
        RunError: a file of this run, or of one that it starts from, was changed.
    """
    sources = {"run.init_from": config.run.init_from, ADAPTERS: config.curriculum.adapters.load_from}
    there = {key: path for key, path in sources.items() if path is not None and os.path.isdir(path)}
    if known_text(config) and (config.run.init_from is None or "run.init_from" in there):
        return prepare(config, run_dir)
    if run_dir.is_dir():
        check_files(run_dir)
    if not saved_items(run_dir):  # what has been saved is no longer taken from another run
        for key, path in there.items():
            _check_source(key, path)
    placement = start_devices(config)
    tokenizer = _tokenizer(config)
    rack = create_rack_from_config(config, tokenizer.vocab_size)
    padded_vocab(rack.vocab_size, tokenizer.vocab_size, 1)
    plan = make_plan(config, rack_shape(rack, config.data))
    rack = regroup(rack, plan.stack_sizes)
    n = config.data.batch_size * max(phase.steps for phase in plan.phases)
    nothing_NT = np.broadcast_to(np.int32(0), (n, config.data.seq_len))  # one number, seen N * T times
    text = Dataset(nothing_NT, nothing_NT, nothing_NT, n_bytes=0, fingerprint="")
    return Setup(config, run_dir, tokenizer, rack, plan, placement, text, text)


def _check_source(key: str, path: str) -> None:
    """Refuse a folder that is no run, or one that was changed. One that is not there yet is not looked for."""
    try:
        Source(path)
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from None


def _tokenizer(config: StackWiseConfig) -> Any:
    cfg = config.tokenizer
    if cfg.kind == "bytes" or (cfg.kind == "file" and Path(str(cfg.path)).is_file()):
        return load_tokenizer(cfg, None, None)
    size = cfg.vocab_size if cfg.kind == "sentencepiece" else config.model.vocab_size or cfg.vocab_size
    return NoTokenizer(min(size, config.model.vocab_size or size))


def resketch(setup: Setup, config: StackWiseConfig) -> Setup:
    """The setup of another configuration of the same text and tokenizer.

    Raises:
        UsageError: the configuration cannot be run.
    """
    validate(without_text(config))
    rack = create_rack_from_config(config, setup.tokenizer.vocab_size)
    plan = make_plan(config, rack_shape(rack, config.data))
    return dataclasses.replace(setup, config=config, rack=regroup(rack, plan.stack_sizes), plan=plan)
