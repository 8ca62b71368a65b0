"""Recipes against their controls.

A recipe's control is the plain model, trained end to end with the same FLOPs, whose learning state is the largest that
is no larger than the recipe's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs import Job
from recipes import RECIPES

SLACK = 1.001  # learning states so close count as equal
CLEAR = 2.0  # a difference counts from so many standard errors on


@dataclass
class Line:
    """One recipe with all its seeds at the chosen learning rate."""

    name: str
    runs: dict[int, dict[str, Any]]  # by seed

    @property
    def bits(self) -> float:
        """Bits per byte, mean over the seeds."""
        return statistics.fmean(run["bits_per_byte"] for run in self.runs.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation between seeds."""
        values = [run["bits_per_byte"] for run in self.runs.values()]
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def state(self) -> int:
        """Peak learning state, bytes."""
        return self._first["learning_state"]

    @property
    def seconds(self) -> float:
        return statistics.fmean(run["seconds"] for run in self.runs.values())

    @property
    def _first(self) -> dict[str, Any]:
        return self.runs[min(self.runs)]

    def __getitem__(self, figure: str) -> Any:
        """A figure that is the same for all seeds."""
        return self._first[figure]


def lines_of(results: Mapping[Job, dict], rates: Mapping[str, float], measure: str) -> list[Line]:
    """The recipes with this measure that have a result at their learning rate, in the order of the table of recipes."""
    found = []
    for name, recipe in RECIPES.items():
        runs = {job.seed: run for job, run in results.items() if (job.recipe, job.lr) == (name, rates.get(recipe.lr))}
        if runs and recipe.measure == measure:
            found.append(Line(name, runs))
    return found


def best_recipes(results: Mapping[Job, dict], jobs: Iterable[Job], n: int) -> list[str]:
    """The n recipes, controls aside, with the fewest bits per byte."""
    found = [job for job in jobs if job in results and not RECIPES[job.recipe].plain]
    found = [job for job in found if RECIPES[job.recipe].measure == "next token"]
    return [job.recipe for job in sorted(found, key=lambda job: results[job]["bits_per_byte"])[:n]]


def noise_between_seeds(lines: Sequence[Line]) -> float | None:
    """Standard deviation of one run, pooled over the recipes that have several seeds."""
    known = [(len(line.runs) - 1, line.spread**2) for line in lines if line.spread is not None]
    return math.sqrt(sum(n * v for n, v in known) / sum(n for n, _ in known)) if known else None


def compared(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One row per recipe: its figures, and the difference to its control over the seeds that both have."""
    noise = noise_between_seeds(lines)
    plain = [line for line in lines if RECIPES[line.name].plain]
    rows = []
    for line in lines:
        row = {"recipe": line.name, "bits_per_byte": line.bits, "seeds": len(line.runs), "spread": line.spread}
        row |= {name: line[name] for name in ("learning_state", "resident", "flops", "steps", "tokens", "phases")}
        row |= {"seconds": line.seconds, "standard_error": line["standard_error"], "plain": line in plain}
        fitting = [model for model in plain if model.state <= line.state * SLACK]
        if line not in plain and fitting:
            control = max(fitting, key=lambda model: model.state)
            best = max(fitting, key=lambda model: difference(line, model))
            row |= {"control": control.name, "difference": difference(line, control)}
            row |= {"verdict": verdict(line, control, noise), "best_plain": best.name}
            row |= {"to_best_plain": difference(line, best), "case": verdict(line, best, noise)}
        rows.append(row)
    return rows


def difference(line: Line, control: Line) -> float:
    """Bits per byte above the control, over the seeds that both have (if none: between the means)."""
    both = line.runs.keys() & control.runs.keys()
    if not both:
        return line.bits - control.bits
    return statistics.fmean(line.runs[s]["bits_per_byte"] - control.runs[s]["bits_per_byte"] for s in both)


def verdict(line: Line, control: Line, noise: float | None) -> str:
    """Whether the recipe beats the control by more than the noise."""
    gap = difference(line, control)
    if noise is None:
        return ("yes" if gap < 0 else "no") + ", noise unknown"
    error = noise * math.sqrt(2 / max(len(line.runs.keys() & control.runs.keys()), 1))
    if abs(gap) <= CLEAR * error:
        return "no, within noise"
    return "yes" if gap < 0 else "no"
