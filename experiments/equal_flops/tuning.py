"""What is said of the learning rates that were tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs import Job
from recipes import RECIPES, TUNED


def tried_rates(results: Mapping[Job, dict[str, Any]], kind: str) -> dict[float, float]:
    """Bits per byte at seed 0 of the tuned recipe of a kind, by learning rate, rates rising."""
    name = TUNED[kind]
    return dict(sorted((job.lr, run["bits_per_byte"]) for job, run in results.items() if _is_trial(job, name)))


def _is_trial(job: Job, name: str) -> bool:
    return (job.recipe, job.seed) == (name, 0)


def edge_warnings(results: Mapping[Job, dict[str, Any]], rates: Mapping[str, float]) -> list[str]:
    """One sentence for each chosen rate that is the lowest or the highest of several tried ones."""
    found = []
    for kind, rate in rates.items():
        tried = list(tried_rates(results, kind))
        if len(tried) > 1 and rate in (tried[0], tried[-1]):
            end = "lowest" if rate == tried[0] else "highest"
            found.append(
                f"the learning rate {rate:g} ({kind}) is the {end} that was tried; a better one may lie beyond it, so "
                "give --lrs that reach further"
            )
    return found


def describe_tuning(results: Mapping[Job, dict[str, Any]], rates: Mapping[str, float]) -> str:
    """What every learning rate that was tried came to, who inherits it, and what was chosen at seed 0."""
    chosen_at_zero = "The best recipes and the best plain models were chosen at seed 0."
    texts, untried = [], []
    for kind, rate in rates.items():
        tried = tried_rates(results, kind)
        if len(tried) > 1:
            found = ", ".join(f"{lr:g}: {bits:.3f}" for lr, bits in tried.items())
            texts.append(f"{kind} on `{TUNED[kind]}` {found}, so {rate:g}")
        else:
            untried.append(f"{kind} {rate:g}")
    parts = []
    if texts:
        names = " and ".join(f"`{TUNED[kind]}`" for kind in rates if len(tried_rates(results, kind)) > 1)
        diffusion = any(RECIPES[job.recipe].measure == "mask diffusion" for job in results)
        parts.append(
            f"Learning rates were tuned at seed 0, on {names} and for next-token prediction only: {'; '.join(texts)}. "
            f"All other recipes{', those of mask diffusion too,' if diffusion else ''} inherit them."
        )
    if untried:
        parts.append(f"Learning rates that were not tuned: {', '.join(untried)}.")
    parts.append(chosen_at_zero)
    parts += [f"**Warning: {warning}.**" for warning in edge_warnings(results, rates)]
    return " ".join(parts)
