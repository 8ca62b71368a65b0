"""The held-out loss of a trained run, at any depth, on its own held-out text or on a file."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from stackwise_jax.config.schema import ObjectiveKind
from stackwise_jax.curriculum import AttentionMode, Noise, Objective
from stackwise_jax.data import Dataset, load_datasets, load_text_dataset
from stackwise_jax.engine import LoadedRun, TaskSpec, held_out, held_out_batches, vocab_of
from stackwise_jax.engine.directory import check_unchanged
from stackwise_jax.errors import UsageError


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


def evaluate_run(
    loaded: LoadedRun, dataset: Dataset, *, task: Task | None = None, limit: int = 0, draws: int = 1
) -> dict[str, Any]:
    """Loss of a loaded run on a text, by the objective of the last phase that trained it or by another.

    For mask diffusion trained at some levels of noise the measure is still the bound on the likelihood (elbo), because
    that is what can be compared; its corruption is drawn with fixed seeds, example by example, so that neither the
    order of the examples nor the size of the batches matters.

    Args:
        task: what is asked of the rack; None: `task_of`.
        limit: at most so many batches; 0: the whole text.
        draws: corruptions of the text that are averaged (mlm, diffusion); more of them narrow the standard error.

    Returns:
        loss (nats per token), perplexity, bits_per_byte, accuracy, tokens, and standard_error of bits_per_byte over the
        draws (None for a single draw; 0 for clm, which draws nothing).
    """
    objective, noise, attention_mode = task or task_of(loaded)
    rack, placement = loaded.rack, loaded.placement
    ends = rack.clone(stacks=rack.stacks[:1], parent=None)
    spec = TaskSpec(ends, objective, noise, attention_mode, vocab_of(loaded.tokenizer), placement)
    stacks = list(zip(rack.stacks, loaded.params["stacks"].values(), strict=True))
    table = placement.put(jnp.asarray(loaded.tokenizer.token_bytes, jnp.float32), placement.replicated)
    n_devices = placement.mesh.size  # the batch is split evenly over them, whatever the run had
    batch_size = -(-loaded.config.data.batch_size // n_devices) * n_devices
    pad_id = loaded.tokenizer.pad_id
    random = objective.kind != "clm"
    results = [
        held_out(
            spec,
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
    bits = [result["bits_per_byte"] for result in results]
    error = None if random else 0.0
    if len(bits) > 1:
        error = statistics.stdev(bits) / math.sqrt(len(bits))
    return mean | {"perplexity": _perplexity(mean["loss"]), "standard_error": error, "noise": noise.kind}


class Task(NamedTuple):
    """What is asked of a rack when it is evaluated."""

    objective: Objective
    noise: Noise
    attention_mode: AttentionMode | None


def task_of(loaded: LoadedRun, kind: ObjectiveKind | None = None, attention_mode: AttentionMode | None = None) -> Task:
    """What the last phase asked of the rack, or another objective or attention.

    Args:
        kind: None: the phase's. mlm hides objective.mask_fraction of the run's configuration, diffusion is the bound.
        attention_mode: None: the phase's, or where `kind` is another what goes with it.

    Raises:
        UsageError: clm with bidirectional attention, which would see its own targets.
    """
    phase = loaded.phase
    if kind is None or kind == phase.objective.kind:
        task = Task(phase.objective, phase.noise, attention_mode or phase.attention_mode)
    else:
        share = loaded.config.objective.mask_fraction
        noise = {"clm": Noise(), "mlm": Noise(kind="fixed", low=share, high=share), "diffusion": _WHOLE}[kind]
        natural: AttentionMode = "causal" if kind == "clm" else "bidirectional"
        task = Task(Objective(kind=kind), noise, attention_mode or natural)
    if task.objective.kind == "diffusion" and task.noise.kind != "elbo":
        task = task._replace(noise=_WHOLE)
    if task.objective.kind == "clm" and task.attention_mode == "bidirectional":
        raise UsageError(
            "objective clm sees its own targets under bidirectional attention; write --attention_mode causal"
        )
    return task


def evaluate_experts(
    experts: Sequence[LoadedRun], dataset: Dataset, *, limit: int = 0, draws: int = 1
) -> dict[str, Any]:
    """Loss of several denoisers, each for its own interval of noise: the sum of their partial bounds (elbo).

    Where the intervals that they were trained on overlap, each takes its half.

    Returns:
        As `evaluate_run`; accuracy is the mean over the experts.
    """
    ordered = sorted(experts, key=lambda expert: expert.phase.noise.low)
    noises = [expert.phase.noise for expert in ordered]
    cuts = [0.0, *((a.high + b.low) / 2 for a, b in itertools.pairwise(noises)), 1.0]
    parts = []
    for expert, (low, high) in zip(ordered, itertools.pairwise(cuts), strict=True):
        task = task_of(expert)._replace(noise=Noise(kind="elbo", low=low, high=high))
        parts.append(evaluate_run(expert, dataset, task=task, limit=limit, draws=draws))
    total = {name: sum(part[name] for part in parts) for name in ("loss", "bits_per_byte")}
    errors = [part["standard_error"] for part in parts]
    error = None if None in errors else math.hypot(*errors)
    accuracy = statistics.fmean(part["accuracy"] for part in parts)
    rest = {"accuracy": accuracy, "tokens": parts[0]["tokens"], "standard_error": error, "noise": "elbo"}
    return total | {"perplexity": _perplexity(total["loss"])} | rest


_WHOLE = Noise(kind="elbo", low=0.0, high=1.0)  # the bound over all shares


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
