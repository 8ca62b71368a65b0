"""Where each byte of a model lives, by way of training it: a picture and a table of what the planner says.

    python experiments/memory_picture.py [--config FILE] [--out docs/memory.svg] [--set KEY=VALUE] [--json]

Nothing is measured and nothing is allocated: the figures are those of `python -m stackwise_jax.plan` for an H200, the
last phase of each way, by formula and from shapes. Matplotlib draws: pip install 'stackwise_jax[experiments]'.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import CONFIGS, arguments, print_table

from stackwise_jax.config import load_config
from stackwise_jax.engine.planner import plan_run
from stackwise_jax.engine.sketch import sketch
from stackwise_jax.memory.devices import machine_of

STACKWISE = {"curriculum.plan": "stackwise", "curriculum.frozen": "nf4", "memory.finished": "frozen"}
STREAMED = STACKWISE | {"cache.kind": "recompute"}
CACHE = {"cache.host_budget": "32GiB", "curriculum.steps": 256}
WAYS: dict[str, dict[str, Any]] = {
    "end to end, resident": {"memory.offload": "none"},
    "end to end, offload trunk+optimizer": {"memory.offload": "trunk+optimizer"},
    "end to end, offload all": {"memory.offload": "all"},
    "end to end, offload all, to disk": {"memory.offload": "all", "memory.offload_to": "disk"},
    "one stack, nf4 trunk on the device": STREAMED | {"memory.offload": "none"},
    "one stack, cached": STACKWISE | {"memory.offload": "none", "cache.kind": "host"} | CACHE,
    "one stack, offload trunk": STREAMED | {"memory.offload": "trunk"},
    "one stack, offload trunk+optimizer": STREAMED | {"memory.offload": "trunk+optimizer"},
    "one stack, offload all": STREAMED | {"memory.offload": "all"},
}
PLACES = ("device", "host", "disk")
# Parts in the order in which they are stacked; those of the disk that are like others have their colours.
COLORS = {
    "weights": "#4477aa",
    "learning weights": "#66ccee",
    "optimizer": "#ee6677",
    "gradients": "#ccbb44",
    "update": "#aa7733",
    "activations": "#228833",
    "head loss": "#aa3377",
    "cache": "#99dd88",
    "buffers": "#777777",
    "saving": "#444444",
    "runtime": "#cccccc",
}
SMALL = {"data", "text"}  # a few megabytes: not drawn


def places_of(file: str, changes: dict[str, Any], overrides: Sequence[str]) -> dict[str, dict[str, int]]:
    """Bytes by place and part in the last phase."""
    settings = [f"--{key}={value}" for key, value in changes.items()] + [f"--{change}" for change in overrides]
    config = load_config(CONFIGS / file, settings)
    planned = plan_run(sketch(config, Path("runs/picture")), machine_of("h200", "2TiB", "2TiB", Path()))
    demand = planned.phases[-1].demand
    return {place: {name: part.bytes for name, part in getattr(demand, place).items()} for place in PLACES}


def merged(parts: dict[str, int]) -> dict[str, int]:
    """Parts as they are drawn: what waits on disk counts with its kind, what is small is left out."""
    found = dict.fromkeys(COLORS, 0)
    for name, size in parts.items():
        if name not in SMALL:
            found[name.removeprefix("offloaded ")] += size
    return {name: size for name, size in found.items() if size}


def draw(path: Path, rows: dict[str, dict[str, dict[str, int]]], title: str) -> None:
    """Write an SVG: a panel per place, a bar per way."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "memory", "font.size": 9}):
        figure, axes = pyplot.subplots(1, len(PLACES), figsize=(13, 4.4), sharey=True)
        names = list(rows)[::-1]
        for axis, place in zip(axes, PLACES, strict=True):
            left = dict.fromkeys(names, 0.0)
            for part, color in COLORS.items():
                sizes = [merged(rows[name][place]).get(part, 0) / 1e9 for name in names]
                axis.barh(names, sizes, left=[left[name] for name in names], color=color, label=part)
                left = {name: left[name] + size for name, size in zip(names, sizes, strict=True)}
            for name in names:
                total = sum(rows[name][place].values()) / 1e9
                axis.text(left[name], name, f" {total:.1f}", va="center", fontsize=8)
            axis.set_xlim(0, 1.15 * max(left.values()))
            axis.set(title=place, xlabel="GB")
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title, x=0.01, ha="left")
        used = {part for row in rows.values() for place in PLACES for part in merged(row[place])}
        handles, labels = axes[0].get_legend_handles_labels()
        shown = [(h, label) for h, label in zip(handles, labels, strict=True) if label in used]
        figure.legend(*zip(*shown, strict=True), loc="lower center", ncols=len(shown), frameon=False)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--config", default="llama_7b_24gb.yaml", help="a file of configs/")
    parser.add_argument("--out", type=Path, default=CONFIGS.parent / "docs" / "memory.svg", help="the picture")
    args = parser.parse_args(argv)
    ways = dict(list(WAYS.items())[:2]) if args.smoke else WAYS
    rows = {name: places_of(args.config, changes, args.set) for name, changes in ways.items()}
    total = lambda name, place: sum(rows[name][place].values()) / 1e9
    print_table(
        f"GB of the last phase, as planned: {args.config}",
        [{"": name} | {place: f"{total(name, place):.1f}" for place in PLACES} for name in rows],
    )
    model = dataclasses.asdict(load_config(CONFIGS / args.config).model)
    blocks = model["architecture"]["n_stacks"] * model["architecture"]["blocks_per_stack"]
    draw(args.out, rows, f"{blocks} blocks of width {model['d_model']} ({args.config}), computed, not measured")
    if args.json:
        print(json.dumps(rows))
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
