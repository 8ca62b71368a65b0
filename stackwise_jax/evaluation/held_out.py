"""The held-out loss of a trained run, at any depth, on its own held-out text or on a file.

Legend: D draws of the corruption, N batches of the text.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from stackwise_jax.config.schema import ObjectiveKind
from stackwise_jax.curriculum import AttentionMode, Noise, Objective
from stackwise_jax.data import Dataset, load_datasets, load_text_dataset, training_texts
from stackwise_jax.engine import LoadedRun, TaskSpec, held_out_batches, held_out_sums, quotients, vocab_of
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
    known = _training_texts(loaded)
    return load_text_dataset(path, dataclasses.replace(data, source=source), loaded.tokenizer, known=known)


def _training_texts(loaded: LoadedRun) -> Iterable[str]:
    """The text that a run was trained on, where it was somebody's own and is still there."""
    data = loaded.config.data
    try:
        return training_texts(data, loaded.config.run.seed) if data.source in ("text", "jsonl") else ()
    except UsageError:
        return ()


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
        loss (nats per token), perplexity, bits_per_byte, accuracy, tokens, and the standard_error of bits_per_byte
        (None for a single draw; 0 for clm, which draws nothing; see the function of this name).
    """
    task = task or task_of(loaded)
    sums_DN = _draws(loaded, dataset, task, limit, draws)
    results = list(map(quotients, sums_DN))
    mean = {name: statistics.fmean(result[name] for result in results) for name in results[0]}
    error = standard_error(sums_DN) if task.objective.kind != "clm" else 0.0
    return mean | {"perplexity": _perplexity(mean["loss"]), "standard_error": error, "noise": task.noise.kind}


def _draws(loaded: LoadedRun, dataset: Dataset, task: Task, limit: int, draws: int) -> list[list[dict[str, float]]]:
    """The sums of each batch in each draw of the corruption; a single draw for clm."""
    rack, placement = loaded.rack, loaded.placement
    ends = rack.clone(stacks=rack.stacks[:1], parent=None)
    vocab = vocab_of(loaded.tokenizer)
    spec = TaskSpec(ends, task.objective, task.noise, task.attention_mode, vocab, placement)
    stacks = list(zip(rack.stacks, loaded.params["stacks"].values(), strict=True))
    table = placement.put(jnp.asarray(loaded.tokenizer.token_bytes, jnp.float32), placement.replicated)
    n_devices = placement.mesh.size  # the batch is split evenly over them, whatever the run had
    batch_size = -(-loaded.config.data.batch_size // n_devices) * n_devices
    return [
        held_out_sums(
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


def standard_error(sums_DN: Sequence[Sequence[Mapping[str, float]]]) -> float | None:
    """How far bits per byte, averaged over the draws, would be from its mean over all corruptions of this text.

    It says nothing of other texts, nor of other trainings. The corruptions of two batches are independent, so the
    variance of their sum is the sum of their variances over the draws: N (D - 1) degrees of freedom, where the D
    figures of the whole text would have D - 1.

    Args:
        sums_DN: nll and bytes of each batch in each draw.

    Returns:
        None for one draw, which says nothing of it.
    """
    n_draws, n_batches = len(sums_DN), len(sums_DN[0])
    if n_draws < 2:
        return None
    nll_DN, bytes_DN = (np.array([[batch[name] for batch in row] for row in sums_DN]) for name in ("nll", "bytes"))
    n_bytes = max(float(bytes_DN.sum()), 1.0)
    # Where the draw decides how many bytes count (mlm), of the quotient's variance the part that is linear in them.
    rest_DN = nll_DN - nll_DN.sum() / n_bytes * bytes_DN
    of_a_draw = float(np.square(rest_DN - rest_DN.mean(axis=0)).sum()) / (n_draws - 1)
    error = math.sqrt(of_a_draw * n_draws) / n_bytes / math.log(2)
    # The root of an unbiased variance is too small on average, for 1 degree of freedom by a fifth.
    free = n_batches * (n_draws - 1)
    return error / math.exp(math.lgamma((free + 1) / 2) - math.lgamma(free / 2)) * math.sqrt(free / 2)


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
    found = [list(map(quotients, draw)) for draw in zip(*parts, strict=True)]
    totals = [{name: sum(part[name] for part in draw) for name in draw[0]} for draw in found]
    mean = {name: statistics.fmean(total[name] for total in totals) for name in totals[0]}
    # Experts meet the same corruption in a draw, so what varies independently are batches, summed over the experts.
    sums_DN = [[_added(batches) for batches in zip(*draw, strict=True)] for draw in zip(*parts, strict=True)]
    return mean | {
        "perplexity": _perplexity(mean["loss"]),
        "accuracy": mean["accuracy"] / len(ordered),
        "tokens": mean["tokens"] / len(ordered),
        "standard_error": standard_error(sums_DN),
        "noise": "elbo",
    }


def _added(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The sums of a batch over the experts, all of which are divided by the bytes of the same text."""
    return {"nll": sum(part["nll"] for part in parts), "bytes": parts[0]["bytes"]}


_WHOLE = Noise(kind="elbo", low=0.0, high=1.0)  # the bound over all shares


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
