"""The held-out loss of a trained run, at any depth, on its own held-out text or on a file."""

from __future__ import annotations

import dataclasses
import itertools
import logging
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

log = logging.getLogger(__name__)


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
    if data.path is not None and Path(path).resolve() == Path(data.path).resolve():
        log.warning("%s is the text that this run was trained on; its loss measures memory", path)
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
    task = task or task_of(loaded)
    results = _draws(loaded, dataset, task, limit, draws)
    mean = {name: statistics.fmean(result[name] for result in results) for name in results[0]}
    error = _error([result["bits_per_byte"] for result in results], random=task.objective.kind != "clm")
    return mean | {"perplexity": _perplexity(mean["loss"]), "standard_error": error, "noise": task.noise.kind}


def _draws(loaded: LoadedRun, dataset: Dataset, task: Task, limit: int, draws: int) -> list[dict[str, float]]:
    """What `held_out` finds in each draw of the corruption; a single one for clm."""
    rack, placement = loaded.rack, loaded.placement
    ends = rack.clone(stacks=rack.stacks[:1], parent=None)
    vocab = vocab_of(loaded.tokenizer)
    spec = TaskSpec(ends, task.objective, task.noise, task.attention_mode, vocab, placement)
    stacks = list(zip(rack.stacks, loaded.params["stacks"].values(), strict=True))
    table = placement.put(jnp.asarray(loaded.tokenizer.token_bytes, jnp.float32), placement.replicated)
    n_devices = placement.mesh.size  # the batch is split evenly over them, whatever the run had
    batch_size = -(-loaded.config.data.batch_size // n_devices) * n_devices
    return [
        held_out(
            spec,
            stacks,
            loaded.params["embed"],
            loaded.params["head"],
            held_out_batches(dataset, batch_size, loaded.tokenizer.pad_id, limit),
            table,
            draw=draw,
        )
        for draw in range(draws if task.objective.kind != "clm" else 1)
    ]


def _error(bits: list[float], *, random: bool) -> float | None:
    """The standard error of the mean over draws; 0 where nothing is drawn, None where one draw says nothing of it."""
    if not random:
        return 0.0
    return statistics.stdev(bits) / math.sqrt(len(bits)) if len(bits) > 1 else None


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
    if task.objective.kind == "diffusion":
        whole = task.noise.kind == "elbo" and (task.noise.low, task.noise.high) == (0.0, 1.0)
        task = task if whole else task._replace(noise=_WHOLE)
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
        parts.append(_draws(expert, dataset, task, limit, draws))
    # All experts meet the same corruption in a draw, so the sums of the draws are what varies.
    sums = [{name: sum(part[name] for part in draw) for name in draw[0]} for draw in zip(*parts, strict=True)]
    mean = {name: statistics.fmean(total[name] for total in sums) for name in sums[0]}
    return mean | {
        "perplexity": _perplexity(mean["loss"]),
        "accuracy": mean["accuracy"] / len(ordered),
        "tokens": mean["tokens"] / len(ordered),
        "standard_error": _error([total["bits_per_byte"] for total in sums], random=True),
        "noise": "elbo",
    }


_WHOLE = Noise(kind="elbo", low=0.0, high=1.0)  # the bound over all shares


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
