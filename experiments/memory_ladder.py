"""One model, one lever after another: what each does to the peak of device memory and to the speed.

    python experiments/memory_ladder.py [--config FILE] [--only N ..] [--set KEY=VALUE] [--smoke] [--json]

Each row keeps the levers of the rows before it and runs in a process of its own (see one_phase.py for what is counted).
The cross entropy always works in chunks and never holds all logits, so it is no lever here. Rows marked * train the
last stack only, over a frozen trunk: they save memory by learning less at a time, which costs quality (see
docs/curricula.md); the rows before them train the same model end to end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from common import arguments, finish, print_table
from one_phase import in_fresh_process

CONFIG = "quickstart.yaml"
# Small for a CPU, with weights that count beside the activations; --set replaces them.
SIZES = {
    "model.d_model": 256,
    "model.d_ff": 768,
    "model.freeze_up_proj": False,
    "model.architecture.n_stacks": 12,
    "model.architecture.blocks_per_stack": 1,
    "data.batch_size": 8,
    "data.seq_len": 128,
}
LEVERS: list[tuple[str, dict[str, Any]]] = [
    ("fp32, all on the device", {"curriculum.plan": "rackwise"}),
    ("+ bf16 compute", {"model.compute_dtype": "bf16"}),
    ("+ remat", {"model.remat": True}),
    ("+ 4 microbatches", {"optimizer.microbatches": 4}),
    ("+ 8-bit Adam", {"optimizer.name": "adamw8bit"}),
    ("+ bf16 weights, stochastic rounding", {"model.param_dtype": "bf16", "optimizer.rounding": "stochastic"}),
    ("+ optimizer in host memory", {"memory.offload": "trunk+optimizer", "optimizer.clip": "stack"}),
    ("+ weights in host memory", {"memory.offload": "all"}),
    ("+ stack inputs in host memory", {"memory.stack_inputs": "host"}),
    (
        "* one stack learns, int8 trunk on the device",
        {
            "curriculum.plan": "stackwise",
            "curriculum.frozen": "int8",
            "cache.kind": "recompute",
            "memory.offload": "none",
            "memory.stack_inputs": "device",
        },
    ),
    ("* + nf4 trunk", {"curriculum.frozen": "nf4"}),
    ("* + trunk in host memory", {"memory.offload": "trunk"}),
    ("* + optimizer in host memory", {"memory.offload": "trunk+optimizer"}),
    ("* + weights in host memory", {"memory.offload": "all"}),
]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--config", default=CONFIG, help="a file, of configs/ where it names no folder")
    parser.add_argument("--only", nargs="*", type=int, help=f"these rows, of 0 to {len(LEVERS) - 1}; none: all")
    parser.add_argument("--rounds", type=int, default=1, help="how often steps are timed")
    parser.add_argument("--steps", type=int, default=3, help="steps each time")
    args = parser.parse_args(argv)
    rounds, steps = (1, 1) if args.smoke else (args.rounds, args.steps)
    changes: dict[str, Any] = {} if args.smoke or args.config != CONFIG else SIZES
    rows: list[dict[str, Any]] = []
    for number, (name, lever) in enumerate(LEVERS):
        changes = changes | lever
        if args.only is None or number in args.only:
            rows.append({"lever": name} | in_fresh_process(args.config, changes, args, rounds=rounds, steps=steps))
    print_table("Memory ladder", [shown(row, rows[0]) for row in rows])
    result = finish(args, {"rows": rows})
    if failed := [row for row in rows if "error" in row]:
        sys.exit(f"{len(failed)} of {len(rows)} rows failed: {failed[0]['lever']}: {failed[0]['error']}")
    return result


def shown(row: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """A row of the table; bytes in MiB."""
    if "error" in row:
        return {"": row["lever"], "device MiB": row["error"][:60], "to first": "-", "tokens/s": "-", "learn": "-"}
    share = row["device_bytes"] / first["device_bytes"] if "device_bytes" in first else "-"
    return {
        "": row["lever"],
        "device MiB": row["device_bytes"] / 2**20,
        "to first": share,
        "tokens/s": round(row["tokens_per_second"]),
        "learn": row["learn"],
    }


if __name__ == "__main__":
    main(sys.argv[1:])
