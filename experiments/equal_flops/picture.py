"""The picture: quality against learning-state memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare import NO, YES
from reading import MIB

MISSING = "no picture: matplotlib is not installed; write pip install 'stackwise_jax[experiments]' and run this again"
APART = 0.032  # labels of one column, as a share of the height
NEAR = 0.03  # points so near each other belong to one column, as a share of the width


def draw(path: Path, panels: Mapping[str, Sequence[Mapping[str, Any]]], floors: Sequence[float]) -> str | None:
    """Write an SVG with one panel per measure; returns None, or what to install.

    Args:
        panels: measure -> rows of `compare.compared`.
        floors: bits per byte of n-grams, n = 1..; those within a panel are drawn as lines.
    """
    try:
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot
    except ImportError:
        return MISSING
    shown = {measure: rows for measure, rows in panels.items() if rows}
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "equal_flops", "font.size": 9}):
        figure, axes = pyplot.subplots(1, len(shown), figsize=(7.5 * len(shown), 6.5), squeeze=False)
        for axis, (measure, rows) in zip(axes[0], shown.items(), strict=True):
            _panel(axis, measure, rows, floors)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
    return None


def _panel(axis, measure: str, rows: Sequence[Mapping[str, Any]], floors: Sequence[float]) -> None:
    plain = sorted((row for row in rows if row["plain"]), key=lambda row: row["learning_state"])
    recipes = [row for row in rows if not row["plain"]]
    axis.plot(*_places(plain), "o-", color="black", linewidth=1, zorder=3, label="plain model, end to end")
    for kind, (color, label) in KINDS.items():
        points = _places([row for row in recipes if kind_of(row) == kind])
        axis.plot(*points, "o", color=color, label=label, zorder=4)
    states, bits = _places(rows)
    low, high = min(bits), max(bits)
    margin = 0.08 * (high - low) or 0.1
    axis.set_ylim(low - margin, high + margin)
    width = max(states) - min(states) or max(states)
    axis.set_xlim(min(states) - 0.08 * width, max(states) + 0.42 * width)  # room for the labels
    for n, floor in enumerate(floors, start=1):
        if low - margin < floor < high + margin:
            axis.axhline(floor, color="0.7", linestyle=":", linewidth=1)
            axis.text(axis.get_xlim()[0], floor, f" {n}-gram", color="0.4", va="bottom", fontsize=8)
    _label(axis, rows, width, high - low + 2 * margin)
    axis.set(xlabel="peak learning state, MiB", ylabel="held-out bits per byte (fewer are better)")
    axis.set_title(f"{measure}\ngreen: beats its control and the best plain model; grey: undecided; red: worse")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=2, fontsize=8, frameon=False)


KINDS = {  # -> color, label
    "case": ("tab:green", "beats its control and the best plain model that is no larger"),
    "undecided": ("tab:gray", "undecided: within the noise, or too few seeds"),
    "none": ("tab:red", "worse than its control or than that model"),
}


def kind_of(row: Mapping[str, Any]) -> str:
    """Which of KINDS a recipe belongs to; one without a control is undecided."""
    return {YES: "case", NO: "none"}.get(row.get("case", ""), "undecided")


def _places(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["learning_state"] / MIB for row in rows], [row["bits_per_byte"] for row in rows]


def _label(axis, rows: Sequence[Mapping[str, Any]], width: float, height: float) -> None:
    """Names beside the points; in each column of points they are moved apart upwards and joined by thin lines."""
    columns: list[list[tuple[float, float, str]]] = []
    for state, bits, row in sorted(zip(*_places(rows), rows, strict=True), key=lambda place: place[:2]):
        if columns and state - columns[-1][0][0] < NEAR * width:
            columns[-1].append((state, bits, row["recipe"]))
        else:
            columns.append([(state, bits, row["recipe"])])
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    for column in columns:
        for (state, bits, name), y in zip(
            sorted(column, key=lambda point: point[1]),
            spread(sorted(point[1] for point in column), APART * height),
            strict=True,
        ):
            x = state + 0.04 * width
            axis.plot([state, x], [bits, y], color="0.6", linewidth=0.6)
            axis.text(x, y, name, va="center", fontsize=8, bbox=box)


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """Rising heights moved so that neighbours are at least `apart` from each other, each group about its middle."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while (
            len(groups) > 1
            and _middle(groups[-1]) - _middle(groups[-2]) < apart * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_middle(g) + (i - (len(g) - 1) / 2) * apart for g in groups for i in range(len(g))]


def _middle(group: Sequence[float]) -> float:
    return sum(group) / len(group)
