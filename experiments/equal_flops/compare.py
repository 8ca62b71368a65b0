"""Recipes against their controls.

A recipe's control is the plain model, trained end to end with the same FLOPs, whose learning state is the largest that
is no larger than the recipe's; its best plain model is the best of all that are no larger, as seed 0 shows them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs import Job
from recipes import DEEP, RECIPES

SLACK = 1.001  # learning states so close count as equal
CLEAR = 2.0  # a difference counts from so many standard errors on
CLEAR_ALONE = 3.0  # the same where there is one seed, and the noise is that of other recipes
YES, NO, WITHIN = "yes", "no", "no, within noise"
ONE_SEED, ONE_DRAW = "undecided (one seed)", "undecided (one draw)"


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
    def drawn_error(self) -> float | None:
        """Standard error of `bits` over the corruptions that it was measured with (Monte Carlo); None: unknown."""
        return _drawn_error(self, self.runs)

    @property
    def seconds(self) -> float:
        return statistics.fmean(run["seconds"] for run in self.runs.values())

    @property
    def _first(self) -> dict[str, Any]:
        return self.runs[min(self.runs)]

    def __getitem__(self, figure: str) -> Any:
        """A figure that is the same for all seeds, or of the first of them."""
        return self._first[figure]


def lines_of(results: Mapping[Job, dict], rates: Mapping[str, float], measure: str) -> list[Line]:
    """The recipes with this measure that have a result at their learning rate, in the order of the table of recipes."""
    found = []
    for name, recipe in RECIPES.items():
        runs = {job.seed: run for job, run in results.items() if (job.recipe, job.lr) == (name, rates.get(recipe.lr))}
        if runs and recipe.measure == measure:
            found.append(Line(name, runs))
    return found


def fitting_models(line: Line, lines: Iterable[Line]) -> tuple[Line, Line] | None:
    """The control of a recipe and its best plain model; None if no plain model is as small."""
    fitting = [model for model in lines if RECIPES[model.name].plain and model.state <= line.state * SLACK]
    if not fitting:
        return None
    return max(fitting, key=lambda model: model.state), min(fitting, key=lambda model: model["bits_per_byte"])


def to_repeat(lines: Sequence[Line], n: int) -> list[str]:
    """The recipes that are worth more seeds, as seed 0 shows them.

    These are the deep model, the n best recipes that need less learning state than it, and of each of these the control
    and the best plain model.
    """
    deep = [line for line in lines if line.name in DEEP.values()]
    small = [line for line in lines if all(line.state * SLACK < model.state for model in deep)]
    recipes = [line for line in small if not RECIPES[line.name].plain]
    best = sorted(recipes, key=lambda line: line["bits_per_byte"])[:n]
    models = [model for line in best for model in fitting_models(line, lines) or ()]
    return list(dict.fromkeys(line.name for line in [*deep, *models, *best]))


def noise_between_seeds(lines: Sequence[Line]) -> float | None:
    """Standard deviation of one run, pooled over the recipes that have several seeds."""
    known = [(len(line.runs) - 1, line.spread**2) for line in lines if line.spread is not None]
    return math.sqrt(sum(n * v for n, v in known) / sum(n for n, _ in known)) if known else None


def compared(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One row per recipe: its figures, and its differences to its control and to its best plain model.

    Both differences are over the seeds that all three have.
    """
    noise, rows = noise_between_seeds(lines), []
    for line in lines:
        plain = RECIPES[line.name].plain
        row = {"recipe": line.name, "bits_per_byte": line.bits, "seeds": len(line.runs), "spread": line.spread}
        row |= {name: line[name] for name in ("learning_state", "resident", "flops", "steps", "tokens", "phases")}
        row |= {"seconds": line.seconds, "standard_error": line.drawn_error, "plain": plain}
        models = None if plain else fitting_models(line, lines)
        if models:
            control, best = models
            seeds = sorted(line.runs.keys() & control.runs.keys() & best.runs.keys())
            told, against_best = (verdict(line, model, seeds, noise) for model in models)
            row |= {"control": control.name, "difference": difference(line, control, seeds), "verdict": told}
            row |= {"best_plain": best.name, "to_best_plain": difference(line, best, seeds)}
            row |= {"verdict_best_plain": against_best, "case": both(told, against_best), "compared_seeds": len(seeds)}
        rows.append(row)
    return rows


def difference(line: Line, control: Line, seeds: Sequence[int]) -> float:
    """Bits per byte above the control, over these seeds (if there are none: between the means)."""
    if not seeds:
        return line.bits - control.bits
    return statistics.fmean(line.runs[s]["bits_per_byte"] - control.runs[s]["bits_per_byte"] for s in seeds)


def verdict(line: Line, control: Line, seeds: Sequence[int], noise: float | None) -> str:
    """Whether the recipe beats the control by more than the noise: YES, NO, WITHIN, ONE_SEED or ONE_DRAW.

    Args:
        seeds: those that are compared. One alone says nothing of the noise, so that more is asked of the difference.
        noise: standard deviation of one run between seeds. What the measure itself is uncertain by is added to it in
            quadrature; as all are measured with the same corruptions, that is rather too much.
    """
    if noise is None:
        return ONE_SEED
    drawn, drawn_control = (_drawn_error(model, seeds or model.runs) for model in (line, control))
    if drawn is None or drawn_control is None:
        return ONE_DRAW
    gap = difference(line, control, seeds)
    error = math.hypot(noise * math.sqrt(2 / max(len(seeds), 1)), drawn, drawn_control)
    if abs(gap) > error * (CLEAR if len(seeds) > 1 else CLEAR_ALONE):
        return YES if gap < 0 else NO
    return WITHIN if len(seeds) > 1 else ONE_SEED


def both(*verdicts: str) -> str:
    """The verdict on beating one model and another: the least favourable that is certain."""
    return min(verdicts, key=(NO, WITHIN, ONE_SEED, ONE_DRAW, YES).index)


def _drawn_error(line: Line, seeds: Iterable[int]) -> float | None:
    """Standard error of the mean over these seeds that comes from the corruptions it was measured with."""
    errors = [line.runs[seed]["standard_error"] for seed in seeds]
    return None if None in errors else math.hypot(*errors) / len(errors)
