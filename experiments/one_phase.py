"""One phase of a configuration, set up by the engine and run for a few steps: bytes, seconds, FLOPs.

    python experiments/one_phase.py --config FILE [--phase INDEX] [--rounds N] [--steps N] [--set KEY=VALUE] [--json]

The other benchmarks start it once per row, because the most bytes that a process ever held can only be asked of a fresh
one. Nothing is saved: weights that the engine would read back are made again from the seed. `device_bytes` is

- on a GPU or TPU what the runtime counted: peak_bytes_in_use, from the start of the process on;
- on a CPU, where nothing counts, the most that was there at once: at each call of a compiled function its temporaries
  and the outputs that reuse no argument, beside all live arrays in device memory (its arguments are among them).
  Functions that are not compiled ahead of time (initial values, the forward pass of the prefix) do not count.

`model_tflops` counts the matrix products that the model needs, as papers do: rematerialisation is left out, and causal
attention counts half. `predicted_device_bytes` (--predict) is what the planner says of the same phase.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from common import SMOKE, PhaseLoop, arguments, configure, finish

from stackwise_jax.config import StackWiseConfig
from stackwise_jax.engine import Setup
from stackwise_jax.engine.account import step_dims
from stackwise_jax.engine.planner import plan_run
from stackwise_jax.engine.programs import compiled_bytes
from stackwise_jax.memory import peak_device_bytes, peak_host_bytes, step_flops
from stackwise_jax.memory.devices import machine_of

HOST_KIND = "pinned_host"


def live_bytes() -> tuple[int, int]:
    """Bytes of all live arrays in (device memory, pinned host memory); arrays that share a buffer count once."""
    sizes: dict[tuple[bool, int], int] = {}
    for array in jax.live_arrays():
        try:
            for shard in array.addressable_shards:
                on_host = shard.data.sharding.memory_kind == HOST_KIND
                sizes[on_host, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
        except (RuntimeError, ValueError):  # deleted in the meantime
            continue
    return tuple(sum(n for (on_host, _), n in sizes.items() if on_host is kind) for kind in (False, True))


class Meter:
    """The most bytes at once in device memory and in pinned host memory, seen whenever a compiled function is called.

    Use as a context manager. There is no looking in between by a thread: that would keep arrays alive.
    """

    def __init__(self):
        self.device = self.host = 0
        self._needs: dict[int, int] = {}

    def _look(self, compiled: jax.stages.Compiled) -> None:
        if id(compiled) not in self._needs:
            parts = compiled_bytes(compiled)
            self._needs[id(compiled)] = parts["temporaries"] + parts["outputs"]
        device, host = live_bytes()
        self.device, self.host = max(self.device, device + self._needs[id(compiled)]), max(self.host, host)

    def __enter__(self) -> Meter:
        self._call = call = jax.stages.Compiled.__call__

        def measured(compiled, *args, **kwargs):
            self._look(compiled)
            return call(compiled, *args, **kwargs)

        jax.stages.Compiled.__call__ = measured
        return self

    def __exit__(self, *_) -> None:
        jax.stages.Compiled.__call__ = self._call


def model_flops(loop: PhaseLoop) -> int:
    """FLOPs of one step as papers count them: without rematerialisation, causal attention by half."""
    setup, work = loop.setup, loop.work
    dims = step_dims(setup.rack, work.phase, setup.config.data)
    parts = step_flops(dims)
    passes = 3 * sum(len(stack.blocks) for stack in dims.path[dims.first_learning :])  # forward once, backward twice
    if work.cached_batches is not None:
        parts["total"] -= parts["prefix_forward"]
    else:
        passes += sum(len(stack.blocks) for stack in dims.path[: dims.first_learning])
    attention = passes * dims.batch_size * dims.seq_len * 4 * dims.seq_len * dims.d_model
    return parts["total"] - parts["recompute"] - (attention // 2 if work.phase.attention_mode == "causal" else 0)


def predicted_bytes(setup: Setup, index: int) -> int:
    """What the planner says that phase `index` needs on the device, without what is lost between arrays: the counters
    do not see that."""
    memory = setup.config.memory
    machine = machine_of(memory.device, memory.host, memory.disk, setup.run_dir)
    device = plan_run(setup, machine, compiled=machine.here).phases[index].demand.device
    return sum(part.bytes for name, part in device.items() if name != "runtime")


def measure(config: StackWiseConfig, index: int, rounds: int, steps: int) -> tuple[Setup, dict[str, Any]]:
    """What phase `index` needs and how fast it is; and the parts of its run.

    Compiling and the first steps do not count for the time.
    """
    with Meter() as meter, PhaseLoop(config, index, saved=False) as loop:
        loop.loop(2)
        seconds, loss = [], 0.0
        for _ in range(rounds):
            start = time.perf_counter()
            loss = loop.loop(steps)
            seconds.append((time.perf_counter() - start) / steps)
        phase, flops, counted = loop.work.phase, model_flops(loop), peak_device_bytes()
        step = statistics.median(seconds)
        return loop.setup, {
            "phase": phase.name,
            "blocks": sum(len(loop.setup.rack.stacks[i].blocks) for i in phase.path),
            "parameters": loop.setup.rack.parameter_count(),
            "learn": loop.work.trainable,
            "device_bytes": counted or meter.device,
            "pinned_host_bytes": meter.host,
            "rss_bytes": peak_host_bytes(),
            "seconds_per_step": step,
            "tokens_per_second": config.data.batch_size * config.data.seq_len / step,
            "model_tflops": flops / step / 1e12,
            "loss": loss,
        }


def in_fresh_process(file: str, changes: Mapping[str, Any], args: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """Run this file as a program: its answer, or {"error": the last line that it said}.

    Args:
        changes: configuration keys.
        args: of the calling benchmark: --smoke and --set hold here too.
        options: of this program, such as phase or rounds; True for a switch.
    """
    changes = dict(changes) | (SMOKE if args.smoke else {})
    command = [sys.executable, str(Path(__file__)), f"--config={file}", "--json"]
    command += [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
    command += [f"--set={key}={value}" for key, value in changes.items()] + [f"--set={change}" for change in args.set]
    env = (
        os.environ
        | {"JAX_TRACEBACK_FILTERING": "off"}
        | ({"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if args.smoke else {})
    )
    with tempfile.TemporaryDirectory() as cache:  # so that the planner need not compile again what has just run
        env |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        env["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return {"error": said[-1] if said else f"exit code {done.returncode}"}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a file, of configs/ where it names no folder")
    parser.add_argument("--phase", type=int, default=-1, help="its number, counted from the end if negative")
    parser.add_argument("--rounds", type=int, default=3, help="how often it is timed")
    parser.add_argument("--steps", type=int, default=2, help="steps each time")
    parser.add_argument("--predict", action="store_true", help="also ask the planner, afterwards")
    parser.add_argument("--peak_tflops", type=float, help="of the device: print the share that the model's FLOPs have")
    args = parser.parse_args(argv)
    changes = {"curriculum.steps": args.rounds * args.steps + 3, "run.save_every": 0, "run.tensorboard": False}
    config = configure(args.config, changes, args)
    setup, result = measure(config, args.phase, args.rounds, args.steps)
    if args.predict:
        result["predicted_device_bytes"] = predicted_bytes(setup, args.phase)
    if args.peak_tflops:
        result["share_of_peak"] = result["model_tflops"] / args.peak_tflops
    for name in ("device_bytes", "predicted_device_bytes", "pinned_host_bytes", "rss_bytes"):
        if name in result:
            print(f"{name}: {result[name] / 2**20:.1f} MiB")
    print(f"{result['tokens_per_second']:.0f} tokens/s, {result['model_tflops']:.3g} model TFLOP/s")
    return finish(args, result)


if __name__ == "__main__":
    main(sys.argv[1:])
