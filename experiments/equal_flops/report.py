"""The page in Markdown: a plain reading and the tables; and what goes with it into the output folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare import CLEAR, CLEAR_ALONE, compared, lines_of, noise_between_seeds
from jobs import Job
from picture import draw
from reading import MIB, reading
from recipes import RECIPES
from tuning import describe_tuning

MEASURES = ("next token", "mask diffusion")
DRAWN = (
    " Monte Carlo error: the standard error of the bound over the corruptions it was measured with; it is added in "
    "quadrature."
)
GRAMS = ("unigram", "bigram", "trigram")


@dataclass
class Report:
    """What is known so far."""

    floors: list[float]  # bits per byte of n-grams, n = 1..
    command: str
    date: str  # of the report
    machine: str
    rates: dict[str, float] = field(default_factory=dict)  # chosen, by kind of recipe
    results: dict[Job, dict[str, Any]] = field(default_factory=dict)

    def rows(self, measure: str) -> list[dict[str, Any]]:
        """The recipes with this measure against their controls."""
        return compared(lines_of(self.results, self.rates, measure))

    def noise(self, measure: str) -> float | None:
        """Standard deviation between seeds."""
        return noise_between_seeds(lines_of(self.results, self.rates, measure))


def write_report(report: Report, out: Path) -> str:
    """Write RESULTS.md and quality.svg; returns a line about where they are."""
    picture = draw(out / "quality.svg", {measure: report.rows(measure) for measure in MEASURES}, report.floors)
    text = markdown(report) + ("\n![Quality against learning state](quality.svg)\n" if picture is None else "")
    (out / "RESULTS.md").write_text(text, encoding="utf-8")
    return f"tables: {out / 'RESULTS.md'}\n" + (f"picture: {out / 'quality.svg'}" if picture is None else picture)


def markdown(report: Report) -> str:
    """The whole page."""
    floors = [f"{GRAMS[n] if n < len(GRAMS) else f'{n + 1}-gram'} {bits:.3f}" for n, bits in enumerate(report.floors)]
    parts = [
        "# Recipes at equal FLOPs",
        *(text for measure in MEASURES if (text := reading(measure, report.rows(measure)))),
        f"{_measured(report.results.values())} Written {report.date}, {report.machine}:"
        f"\n\n```bash\n{report.command}\n```",
        "Bits per byte of held-out text; fewer are better. Learning state: weights that learn, their gradients and "
        "optimizer state, at the phase that needs most. Resident: that, and all other weights that a step passes; no "
        "activations. Seconds: of training, compilation and short evaluations included.",
        f"n-gram floors (Witten-Bell, counted on the whole training text, of which each run sees a part, and measured "
        f"on the held-out text that the models are measured on): {', '.join(floors)}.",
        describe_tuning(report.results, report.rates),
    ]
    for measure in MEASURES:
        if rows := report.rows(measure):
            parts += _section(measure, rows, report.noise(measure))
    return "\n\n".join(parts) + "\n"


def _measured(results: Iterable[Mapping[str, Any]]) -> str:
    """When, and with which versions of the package, the results were measured."""
    results = list(results)
    dates = sorted({run["date"] for run in results if "date" in run})
    versions = sorted({run["version"] for run in results if "version" in run})
    without = sum("date" not in run for run in results)
    parts = []
    if dates:
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        parts.append(f"Measured {when} with stackwise_jax {', '.join(versions)}.")
    if without:
        parts.append(f"{without} of {len(results)} results say neither their date nor their version.")
    return " ".join(parts)


def _section(measure: str, rows: Sequence[Mapping[str, Any]], noise: float | None) -> list[str]:
    """Both tables of a measure: recipes against their controls, those that lose most first, and plain models."""
    about = "the bound on the likelihood, " if measure == "mask diffusion" else ""
    heading = f"## {measure.capitalize()} ({about}bits per byte)"
    said = "unknown, one seed only" if noise is None else f"standard deviation of one run {noise:.3f}, pooled"
    against = sorted((row for row in rows if "control" in row), key=lambda row: -row["difference"])
    bits = {"bits per byte": _bits} | ({"Monte Carlo error": _drawn} if measure == "mask diffusion" else {})
    parts = [heading, f"Noise between seeds: {said}."]
    if against:
        parts.append(
            "Control: the plain model with as large a learning state, trained end to end with the same FLOPs. Best "
            "plain: the best, at seed 0, of all plain models whose learning state is no larger. A recipe has a case if "
            "it beats both. Both differences are over the seeds (n) that all three have, so they may differ from those "
            f"of the means. A difference counts if it is more than {CLEAR:g} of its standard errors, which come from "
            "the noise pooled over all repeated recipes of this measure; with one seed (n = 1) that noise is borrowed "
            f"from the other recipes and {CLEAR_ALONE:g} standard errors are asked for, and without any repeated "
            f"recipe nothing is decided.{DRAWN if measure == 'mask diffusion' else ''}"
        )
        columns = {
            "recipe": lambda row: f"`{row['recipe']}`",
            **bits,
            "control": lambda row: f"`{row['control']}` {row['difference']:+.3f}",
            "n": lambda row: str(row["compared_seeds"]),
            "beats control": lambda row: row["verdict"],
            "best plain": lambda row: f"`{row['best_plain']}` {row['to_best_plain']:+.3f}",
            "beats best plain": lambda row: row["verdict_best_plain"],
            "has a case": lambda row: row["case"],
        }
        parts.append(_table(columns | _COSTS, against))
    columns = {"plain model": lambda row: f"`{row['recipe']}`"} | bits | _COSTS
    parts.append(_table(columns, [row for row in rows if row["plain"]]))
    lone = [row for row in rows if not row["plain"] and "control" not in row]
    if lone:
        parts += ["Recipes without a control in this run:", _table({"recipe": columns["plain model"]} | columns, lone)]
    told = [f"* `{row['recipe']}`: {RECIPES[row['recipe']].about}" for row in rows]
    return [*parts, "\n".join(told)]


def _bits(row: Mapping[str, Any]) -> str:
    spread = f" ± {row['spread']:.3f} ({row['seeds']} seeds)" if row["spread"] is not None else ""
    return f"{row['bits_per_byte']:.3f}{spread}"


def _drawn(row: Mapping[str, Any]) -> str:
    return "unknown" if row["standard_error"] is None else f"± {row['standard_error']:.4f}"


_COSTS = {
    "learning state, MiB": lambda row: f"{row['learning_state'] / MIB:.2f}",
    "resident, MiB": lambda row: f"{row['resident'] / MIB:.2f}",
    "steps": lambda row: str(row["steps"]),
    "FLOPs": lambda row: f"{row['flops']:.2e}",
    "seconds": lambda row: f"{row['seconds']:.0f}",
}


def _table(columns: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
