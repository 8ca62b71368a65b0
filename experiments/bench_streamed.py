"""The streamed executor against the resident one: the same phase of the same model, over the tokens of a microbatch.

    python experiments/bench_streamed.py [--config FILE] [--batches N ..] [--set KEY=VALUE] [--smoke] [--json]

End to end (plan rackwise). For each batch size all are set up by the engine on the same data and take turns. A streamed
step computes every stack a second time on the way back, as a resident one does with `model.remat`: `speed` is the time
of that one over the streamed step's, so 1 is as fast and smaller is slower. `speed_without_remat` is the same against a
resident step that keeps all activations and computes a quarter less; where that one fits, it is what streaming really
costs. The losses of the first steps must agree. Stacks have one block: within a larger stack a streamed step with
remat computes each block a third time.

What streaming costs is the time of the transfers that the computation of one stack does not hide. Both grow with the
size of a stack, but only the computation grows with the tokens. Target: on a GPU a `speed` of at least 0.85 once a
microbatch holds 8192 tokens. On a CPU host and device share one memory, so only the overhead of the executor is seen.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from common import PhaseLoop, arguments, configure, finish, in_turns, print_table

TARGET = {"speed": 0.85, "microbatch_tokens": 8192}
BATCHES = (2, 8, 32)  # sequences per step
SMOKE_BATCHES = (2, 4)


def measure(batch_size: int, rounds: int, n: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of both executors at one batch size; the resident one with remat and without."""
    changes = {"curriculum.plan": "rackwise", "curriculum.steps": (rounds + 2) * n, "run.save_every": 0}
    changes |= {"optimizer.clip": "stack"}
    changes |= {"model.architecture.n_stacks": args.stacks, "model.architecture.blocks_per_stack": 1}
    ways = {
        "resident": {"memory.offload": "none", "model.remat": False},
        "resident, remat": {"memory.offload": "none", "model.remat": True},
        "streamed": {"memory.offload": args.offload, "memory.stack_inputs": args.stack_inputs, "model.remat": False},
    }
    sized = argparse.Namespace(smoke=args.smoke, set=[f"data.batch_size={batch_size}", *args.set])
    with contextlib.ExitStack() as stack:
        configs = {name: configure(args.config, changes | way, sized) for name, way in ways.items()}
        loops = {name: stack.enter_context(PhaseLoop(config, saved=False)) for name, config in configs.items()}
        config = loops["resident"].setup.config
        losses = {name: [loop.steps_alone(1)["loss"] for _ in range(2)] for name, loop in loops.items()}
        tolerance = 1e-4 if config.model.compute_dtype == "fp32" else 2e-2
        for name in ways:
            np.testing.assert_allclose(losses[name], losses["resident"], rtol=tolerance, err_msg="unlike losses")
        seconds = in_turns({name: (lambda loop=loop: loop.steps_alone(n)) for name, loop in loops.items()}, rounds)
    resident, remat, streamed = seconds.values()
    tokens = config.data.batch_size * config.data.seq_len
    return {
        "microbatch_tokens": tokens // config.optimizer.microbatches,
        "resident_ms": 1e3 * resident.wall / n,
        "resident_remat_ms": 1e3 * remat.wall / n,
        "streamed_ms": 1e3 * streamed.wall / n,
        "speed": remat.wall / streamed.wall,
        "cpu_speed": remat.cpu / streamed.cpu,
        "speed_without_remat": resident.wall / streamed.wall,
        "streamed_tokens_per_second": tokens * n / streamed.wall,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--config", default="quickstart.yaml", help="a file, of configs/ where it names no folder")
    parser.add_argument("--batches", nargs="*", type=int, help=f"sequences per step; none: {BATCHES}")
    parser.add_argument("--stacks", type=int, default=8, help="stacks of the rack, of one block each")
    parser.add_argument("--offload", default="all", choices=("trunk+optimizer", "all"), help="what waits on the host")
    parser.add_argument("--stack_inputs", default="device", choices=("device", "host"), help="where they wait")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed")
    parser.add_argument("--steps", type=int, default=2, help="steps each time")
    args = parser.parse_args(argv)
    rounds, n = (2, 1) if args.smoke else (args.rounds, args.steps)
    batches = args.batches or (SMOKE_BATCHES if args.smoke else BATCHES)
    rows = [measure(batch_size, rounds, n, args) for batch_size in batches]
    print_table("Streamed against resident (GPU target: speed 0.85 from 8192 tokens in a microbatch on)", rows)
    return finish(args, {"offload": args.offload, "target": TARGET, "rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
