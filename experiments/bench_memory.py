"""Device bytes over depth, 12 to 96 blocks of equal width: what grows with the number of blocks and what does not.

    python experiments/bench_memory.py [--only NAME ..] [--depths N ..] [--set KEY=VALUE] [--smoke] [--json]

Four ways to train the same rack, each in its last phase and in a process of its own (see one_phase.py for what is
counted):

- rackwise resident: end to end, everything on the device;
- rackwise streamed: end to end, weights and optimizer state in host memory, one stack at a time on the device;
- stackwise cached: the last stack learns, the output of the others comes from the cache;
- stackwise streamed trunk: the last stack learns over fresh tokens that pass the others, which wait in host memory.

Targets: all but the first stay flat in depth within 2 %, and the planner's figure is within 10 % of what was measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from common import arguments, finish, print_table
from one_phase import in_fresh_process

BLOCKS_PER_STACK = 2
DEPTHS = (12, 24, 48, 96)  # blocks
SMOKE_DEPTHS = (4, 8)
SIZES = {"data.batch_size": 4}  # small for a CPU; --set replaces it
STREAMED = {"memory.stack_inputs": "host", "optimizer.clip": "stack"}
WAYS: dict[str, dict[str, Any]] = {
    "rackwise resident": {"curriculum.plan": "rackwise"},
    "rackwise streamed": {"curriculum.plan": "rackwise", "memory.offload": "all"} | STREAMED,
    "stackwise cached": {"curriculum.plan": "stackwise", "cache.kind": "host"},
    "stackwise streamed trunk": {"curriculum.plan": "stackwise", "cache.kind": "recompute", "memory.offload": "trunk"},
}
FLAT = [name for name in WAYS if name != "rackwise resident"]


def depth_of(blocks: int) -> dict[str, int]:
    """The configuration keys of so many blocks."""
    return {
        "model.architecture.n_stacks": blocks // BLOCKS_PER_STACK,
        "model.architecture.blocks_per_stack": BLOCKS_PER_STACK,
    }


def measure_ways(names: Sequence[str], depths: Sequence[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way and depth; with `error` where it did not run.

    Shallow racks take more steps, so that as many blocks pass the device: what a streamed step needs at most depends on
    when transfers end, and shows only after a while.
    """
    rows = []
    for name in names:
        for blocks in depths:
            options: dict[str, Any] = {"rounds": 1, "steps": args.steps * max(depths) // blocks}
            if not args.smoke or blocks == max(depths):
                options["predict"] = True
            found = in_fresh_process(args.config, SIZES | WAYS[name] | depth_of(blocks), args, **options)
            rows.append({"way": name} | found | {"blocks": blocks})
    return rows


def growth(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By way, device bytes of the deepest rack as a multiple of those of the shallowest."""
    by_way: dict[str, list[int]] = {}
    for row in rows:
        if "error" not in row:
            by_way.setdefault(row["way"], []).append(row["device_bytes"])
    return {name: found[-1] / found[0] for name, found in by_way.items()}


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table; bytes in MiB."""
    mib = lambda name: row[name] / 2**20 if row.get(name) else "-"
    predicted = row.get("predicted_device_bytes")
    return {
        "": row["way"],
        "blocks": row["blocks"],
        "device MiB": row["error"][:40] if "error" in row else mib("device_bytes"),
        "predicted": mib("predicted_device_bytes"),
        "pred/meas": predicted / row["device_bytes"] if predicted and "error" not in row else "-",
        "pinned host": mib("pinned_host_bytes"),
        "RSS": mib("rss_bytes"),
        "ms/step": "-" if "error" in row else 1e3 * row["seconds_per_step"],
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--config", default="quickstart.yaml", help="a file, of configs/ where it names no folder")
    parser.add_argument("--only", nargs="*", choices=WAYS, help="these ways; none: all")
    parser.add_argument("--depths", nargs="*", type=int, help=f"blocks, even numbers; none: {DEPTHS}")
    parser.add_argument("--steps", type=int, default=3, help="steps of the deepest rack; others take more")
    args = parser.parse_args(argv)
    depths = args.depths or (SMOKE_DEPTHS if args.smoke else DEPTHS)
    rows = measure_ways(args.only or list(WAYS), depths, args)
    print_table("Device bytes over depth (target: all but the first way flat within 2 %)", [shown(row) for row in rows])
    factors = growth(rows)
    for name, factor in factors.items():
        print(f"{name}: {factor:.3f} times the bytes at {depths[-1] / depths[0]:.0f} times the depth")
    result = finish(args, {"rows": rows, "growth": factors})
    if failed := [row for row in rows if "error" in row]:
        sys.exit(f"{len(failed)} of {len(rows)} rows failed: {failed[0]['way']}: {failed[0]['error']}")
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
