"""What the benchmarks share: a phase brought to its loop as the engine does it, timing in turns, a table, arguments."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
from rich.console import Console
from rich.table import Table

from stackwise_jax.checkpoint import Progress, Store
from stackwise_jax.config import StackWiseConfig, load_config, validate
from stackwise_jax.engine import Run, directory, prepare
from stackwise_jax.engine.loop import run_phase
from stackwise_jax.reporting import ConsoleReporter, Reporters, TensorBoardReporter

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Sizes at which a benchmark only shows that it works.
SMOKE = {
    "data.source": "synthetic",
    "data.synthetic_tokens": 20_000,
    "data.seq_len": 16,
    "data.batch_size": 4,
    "model.d_model": 16,
    "model.n_heads": 2,
    "model.d_ff": 32,
}


def configure(file: str, changes: Mapping[str, Any], args: argparse.Namespace) -> StackWiseConfig:
    """A configuration of configs/, changed; with --smoke at the smallest sizes, and with what --set says."""
    changes = {"run.sample_tokens": 0} | dict(changes) | (SMOKE if args.smoke else {})
    overrides = [f"--{key}={value}" for key, value in changes.items()] + [f"--{change}" for change in args.set]
    config = load_config(CONFIGS / file, overrides)
    validate(config)
    if args.smoke:
        jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time at these sizes
    return config


class SeedStore(Store):
    """Checkpoints that are never written: what a run reads back is made again from its seed. For phases of models whose
    checkpoints would take longer to write than the measuring does."""

    def __init__(self, run: Run, directory: Path, keep: int = 2):
        super().__init__(directory, keep)
        self._run, self._metas = run, {}

    def save_item(self, name: str, version: int, tree: Any, meta: dict) -> None:
        self._metas[name] = meta

    def item_meta(self, name: str, version: int) -> dict:
        return self._metas[name]

    def commit(self, progress: Progress) -> None:
        """Nothing is there that a record could name."""

    def load_item(self, name: str, version: int, like: Any = None) -> Any:
        weights = self._run.weights
        before, fmt = weights.trees.pop(name, None), weights.formats.get(name)
        weights.grow(name)
        tree = weights.trees.pop(name)
        if before is not None:
            weights.set(name, before, fmt)
        if jax.tree.structure(tree) != jax.tree.structure(like):
            from stackwise_jax.memory.quantized import to_format

            tree = to_format(tree, self._metas[name]["format"])
        return jax.tree.map(lambda x, wanted: jax.device_put(x.astype(wanted.dtype), wanted.sharding), tree, like)


class PhaseLoop:
    """One phase of a run in a directory of its own, set up by the engine and run a few steps at a time.

    Args:
        index: of the phase, counted from the end if negative.
        saved: False: no checkpoint is written, see SeedStore.

    Console and TensorBoard are drawn as in the train command, the console to nowhere. Use as a context manager.
    """

    def __init__(self, config: StackWiseConfig, index: int = 0, *, saved: bool = True):
        self._open = contextlib.ExitStack()
        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory()))
        self.setup = prepare(config, folder / "run")
        board = TensorBoardReporter(folder / "tensorboard", every=config.run.log_every)
        reporter = Reporters([ConsoleReporter(Console(file=io.StringIO())), board])
        self._open.callback(reporter.close)
        self.run = Run(self.setup, reporter)
        with contextlib.nullcontext() if saved else mock.patch.object(directory, "Store", partial(SeedStore, self.run)):
            self.run._open()
        self._open.callback(self.run.recorder.close)
        self._open.callback(self.run.cache.close)
        self.work, self.executor = self.run._set_up(index % len(self.run.phases), 0, time.perf_counter())
        self._open.callback(self.work.feed.close)
        self._feed = iter(self.work.feed)
        self.example = next(self._feed)
        self.executor.compile(self.example)
        self.work.step_bytes = self.executor.step_bytes
        self._step = 0

    def loop(self, n: int) -> float:
        """The engine's own loop: data feed, step, metrics read, logged and reported. Returns the last loss."""
        run, work, executor, first = self.run, self.work, self.executor, self._step
        self._step += n
        losses: list[float] = []

        def on_metrics(step: int, metrics: dict[str, float], seconds: float) -> None:
            losses.append(metrics["loss"])
            run._on_metrics(work, step, metrics, seconds)

        run_phase(
            executor.step,
            itertools.islice(self._feed, n),
            range(first, first + n),
            before_step=lambda step, flush: run._before_step(work, executor, step, 0, flush),
            on_metrics=on_metrics,
        )
        self._settle()
        return losses[-1]

    def steps_alone(self, n: int) -> dict[str, float]:
        """The compiled step by itself, n times on the same data; the metrics of the last."""
        metrics: dict[str, jax.Array] = {}
        for _ in range(n):
            metrics = self.executor.step(self.example)
        self._settle()
        return {name: float(value) for name, value in metrics.items()}

    def _settle(self) -> None:
        """Wait until what the executor has begun is done."""
        executor = self.executor
        jax.block_until_ready((executor.opt, getattr(executor, "state", None), getattr(executor, "learning", None)))

    def __enter__(self) -> PhaseLoop:
        return self

    def __exit__(self, *_) -> None:
        self._open.close()


class Seconds(NamedTuple):
    """Medians. cpu: of all threads of this process; it suffers less than wall time when others use the machine too."""

    wall: float
    cpu: float


def in_turns(work: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Seconds]:
    """Time of each piece of work. Every round runs all of them, each time beginning with another one, so that what else
    happens on the machine meets all alike; the first round does not count."""
    names, found = list(work), {name: [] for name in work}
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            wall, cpu = time.perf_counter(), time.process_time()
            work[name]()
            if number:
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: Seconds(*map(statistics.median, zip(*pairs, strict=True))) for name, pairs in found.items()}


@contextlib.contextmanager
def counting_compilations() -> Iterator[list[float]]:
    """The seconds of each compilation by XLA inside the block."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal keys as a small table; floats with three digits."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=120).print(table)


def arguments(about: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes: shows in seconds that it works")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a configuration key")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return parser


def finish(args: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """Print the JSON line if it was asked for; `result` with the machine and the version of jax."""
    device = jax.devices()[0]
    machine = {"device": f"{jax.device_count()} x {device.device_kind}", "cores": os.cpu_count()}
    result = machine | {"jax": jax.__version__, "set": args.set} | result
    if args.json:
        print(json.dumps(result))
    return result
