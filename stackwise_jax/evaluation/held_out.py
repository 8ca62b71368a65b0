"""The held-out loss of a trained run, at any depth, on its own held-out text or on a file."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from stackwise_jax.data import Dataset, load_datasets, load_text_dataset
from stackwise_jax.engine import LoadedRun, TaskSpec, held_out, held_out_batches, vocab_of
from stackwise_jax.engine.directory import check_unchanged


def held_out_text(loaded: LoadedRun, path: str | Path | None = None) -> Dataset:
    """The run's own held-out text, or the text of a file cut as the run cuts its text.

    Raises:
        UsageError: the file is missing or empty, or the run's own text is no longer the one that was held out.
    """
    data = loaded.config.data
    if path is None:
        dataset = load_datasets(data, loaded.tokenizer, loaded.config.run.seed)[1]
        found = {"held_out": dataset.fingerprint, "tokenizer": loaded.tokenizer.fingerprint}
        check_unchanged(loaded.run_dir, loaded.progress, found)
        return dataset
    source = "jsonl" if str(path).endswith(".jsonl") else "text"
    return load_text_dataset(path, dataclasses.replace(data, source=source), loaded.tokenizer)


def evaluate_run(loaded: LoadedRun, dataset: Dataset, *, limit: int = 0, draws: int = 1) -> dict[str, Any]:
    """Loss of a loaded run on a text, by the objective of the last phase that trained it.

    For mask diffusion trained over a range the measure is still the bound on the likelihood (elbo), because that is
    what can be compared; its corruption is drawn with fixed seeds.

    Args:
        limit: at most so many batches; 0: the whole text.
        draws: corruptions of the text that are averaged (mlm, diffusion); more of them narrow the standard error.

    Returns:
        loss (nats per token), perplexity, bits_per_byte, accuracy, tokens, and standard_error of bits_per_byte over the
        draws (None for a single draw; 0 for clm, which draws nothing).
    """
    phase, rack, placement = loaded.phase, loaded.rack, loaded.placement
    noise = phase.noise
    if noise.kind == "range":
        noise = dataclasses.replace(noise, kind="elbo", low=0.0, high=1.0, schedule="linear")
    ends = rack.clone(stacks=rack.stacks[:1], parent=None)
    task = TaskSpec(ends, phase.objective, noise, phase.attention_mode, vocab_of(loaded.tokenizer), placement)
    stacks = list(zip(rack.stacks, loaded.params["stacks"].values(), strict=True))
    table = placement.put(jnp.asarray(loaded.tokenizer.token_bytes, jnp.float32), placement.replicated)
    n_devices = placement.mesh.size  # the batch is split evenly over them, whatever the run had
    batch_size = -(-loaded.config.data.batch_size // n_devices) * n_devices
    pad_id = loaded.tokenizer.pad_id
    random = phase.objective.kind != "clm"
    results = [
        held_out(
            task,
            stacks,
            loaded.params["embed"],
            loaded.params["head"],
            held_out_batches(dataset, batch_size, pad_id, limit),
            table,
            draw=draw,
        )
        for draw in range(draws if random else 1)
    ]
    mean = {name: statistics.fmean(result[name] for result in results) for name in results[0]}
    mean["perplexity"] = math.exp(mean["loss"]) if mean["loss"] < 700 else math.inf
    bits = [result["bits_per_byte"] for result in results]
    error = None if random else 0.0
    if len(bits) > 1:
        error = statistics.stdev(bits) / math.sqrt(len(bits))
    return mean | {"standard_error": error, "noise": noise.kind}
