"""The tables in Markdown, and what goes with them into the output folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare import compared, lines_of, noise_between_seeds
from jobs import Job
from picture import draw
from recipes import RECIPES, TUNED

MIB = 2**20
MEASURES = ("next token", "mask diffusion")
GRAMS = ("unigram", "bigram", "trigram")


@dataclass
class Report:
    """What is known so far."""

    floors: list[float]  # bits per byte of n-grams, n = 1..
    command: str
    date: str
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
        f"{report.date}, {report.machine}:\n\n```bash\n{report.command}\n```",
        "Bits per byte of held-out text; fewer are better. Learning state: weights that learn, their gradients and "
        "optimizer state, at the phase that needs most. Resident: that, and all other weights that a step passes; no "
        "activations. Seconds: of training, compilation and short evaluations included.",
        f"n-gram floors (Witten-Bell, counted on the whole training text, of which each run sees a part): "
        f"{', '.join(floors)}.",
        *([_tuning(report)] if _tuning(report) else []),
    ]
    for measure in MEASURES:
        if rows := report.rows(measure):
            parts += _section(measure, rows, report.noise(measure))
    return "\n\n".join(parts) + "\n"


def _section(measure: str, rows: Sequence[Mapping[str, Any]], noise: float | None) -> list[str]:
    """Both tables of a measure: recipes against their controls, those that lose most first, and plain models."""
    about = "the bound on the likelihood, " if measure == "mask diffusion" else ""
    heading = f"## {measure.capitalize()} ({about}bits per byte)"
    said = "one seed only" if noise is None else f"standard deviation of one run {noise:.3f}"
    against = sorted((row for row in rows if "control" in row), key=lambda row: -row["difference"])
    parts = [heading, f"Noise between seeds: {said}."]
    if against:
        parts.append(
            "Control: the plain model with as large a learning state, trained end to end with the same FLOPs. Best "
            "plain: the best of all plain models whose learning state is no larger. A recipe has a case if it beats "
            "both; differences up to two standard errors are within noise."
        )
        columns = {
            "recipe": lambda row: f"`{row['recipe']}`",
            "bits per byte": _bits,
            "control": lambda row: f"`{row['control']}` {row['difference']:+.3f}",
            "beats control": lambda row: row["verdict"],
            "best plain": lambda row: f"`{row['best_plain']}` {row['to_best_plain']:+.3f}",
            "has a case": lambda row: row["case"],
        }
        parts.append(_table(columns | _COSTS, against))
    columns = {"plain model": lambda row: f"`{row['recipe']}`", "bits per byte": _bits} | _COSTS
    parts.append(_table(columns, [row for row in rows if row["plain"]]))
    lone = [row for row in rows if not row["plain"] and "control" not in row]
    if lone:
        parts += ["Recipes without a control in this run:", _table({"recipe": columns["plain model"]} | columns, lone)]
    told = [f"* `{row['recipe']}`: {RECIPES[row['recipe']].about}" for row in rows]
    return [*parts, "\n".join(told)]


def _bits(row: Mapping[str, Any]) -> str:
    spread = f" ± {row['spread']:.3f} ({row['seeds']} seeds)" if row["spread"] is not None else ""
    return f"{row['bits_per_byte']:.3f}{spread}"


_COSTS = {
    "learning state, MiB": lambda row: f"{row['learning_state'] / MIB:.2f}",
    "resident, MiB": lambda row: f"{row['resident'] / MIB:.2f}",
    "steps": lambda row: str(row["steps"]),
    "FLOPs": lambda row: f"{row['flops']:.2e}",
    "seconds": lambda row: f"{row['seconds']:.0f}",
}


def _tuning(report: Report) -> str:
    """What every learning rate that was tried came to."""
    texts = []
    for kind, name in TUNED.items():
        tried = {
            job.lr: run["bits_per_byte"] for job, run in report.results.items() if (job.recipe, job.seed) == (name, 0)
        }
        if kind in report.rates and len(tried) > 1:
            found = ", ".join(f"{lr:g}: {bits:.3f}" for lr, bits in sorted(tried.items()))
            texts.append(f"{kind} on `{name}` {found}, so {report.rates[kind]:g}")
    return f"Learning rate, tuned at seed 0 and used for all recipes of the kind: {'; '.join(texts)}." if texts else ""


def _table(columns: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
