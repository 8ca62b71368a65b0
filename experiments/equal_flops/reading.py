"""The figures in plain sentences, what speaks against the recipes first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from compare import NO, ONE_DRAW, ONE_SEED, SLACK, WITHIN, YES
from recipes import DEEP

MIB = 2**20
Row = Mapping[str, Any]


def reading(measure: str, rows: Sequence[Row]) -> str:
    """A list in Markdown of what the rows of `compare.compared` say; empty if there is nothing to compare."""
    against = sorted((row for row in rows if "control" in row), key=lambda row: -row["difference"])
    if not against:
        return ""
    lost = [row for row in against if row["verdict"] == NO]
    won = [row for row in against if row["verdict"] == YES]
    open_ones = [row for row in against if row not in lost and row not in won]
    case = [row for row in against if row["case"] == YES]
    n = len(against)
    sentences = [
        _told(lost, f"of {n} recipes do worse than their control of equal learning state", _to_control),
        _told(open_ones, f"of {n} are undecided or within noise", _to_control),
        _told(won, f"of {n} beat it", _to_control),
        _told(case, f"of {n} have a case: they beat also the best plain model that is no larger", _to_best_plain),
        *_best(measure, rows, against),
    ]
    return "\n".join([f"{measure.capitalize()}, bits per byte (fewer are better):\n", *(f"* {s}" for s in sentences)])


def _told(rows: Sequence[Row], what: str, figure: Callable[[Row], str]) -> str:
    listed = ", ".join(f"`{row['recipe']}` {figure(row)}" for row in rows)
    return f"{len(rows)} {what}{': ' if listed else ''}{listed}."


def _to_control(row: Row) -> str:
    why = {WITHIN: " (within noise)", ONE_SEED: " (one seed)", ONE_DRAW: " (one draw)"}
    return f"{row['difference']:+.3f}{why.get(row['verdict'], '')}"


def _to_best_plain(row: Row) -> str:
    return f"{row['to_best_plain']:+.3f}"


def _best(measure: str, rows: Sequence[Row], against: Sequence[Row]) -> list[str]:
    """The best plain model and the best recipes, each with its distance to the deep model trained end to end."""
    deep = next((row for row in rows if row["recipe"] == DEEP[measure]), None)

    def best_of(rows: Sequence[Row]) -> str:
        best = min(rows, key=lambda row: row["bits_per_byte"])
        seeds = f"{best['seeds']} seed{'s' if best['seeds'] > 1 else ''}"
        text = f"`{best['recipe']}`, {best['bits_per_byte']:.3f} ({seeds}) with {best['learning_state'] / MIB:.2f} MiB"
        if "to_best_plain" in best:
            text += f", {best['to_best_plain']:+.3f} to `{best['best_plain']}`"
        if deep and deep is not best:
            text += f", {best['bits_per_byte'] - deep['bits_per_byte']:+.3f} to `{deep['recipe']}`"
        return text

    told = [f"Best plain model: {best_of([row for row in rows if row['plain']])}."]
    told.append(f"Best recipe: {best_of(against)}.")
    smaller = [row for row in against if deep and row["learning_state"] * SLACK < deep["learning_state"]]
    if deep and smaller:
        told.append(
            f"Best recipe with less learning state than `{deep['recipe']}` ({deep['bits_per_byte']:.3f} with "
            f"{deep['learning_state'] / MIB:.2f} MiB): {best_of(smaller)}."
        )
    return told
