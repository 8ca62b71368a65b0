"""Runs of recipes as processes, several at a time, each in a run directory of its own; nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes import RECIPES

from stackwise_jax.errors import RunError, UsageError

WORKER = Path(__file__).with_name("worker.py")
LOG_LINES = 3  # of a failed run that are shown


@dataclass(frozen=True)
class Job:
    """One run: a recipe at one learning rate and seed."""

    recipe: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.recipe}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Settings:
    """What all runs share. common: overrides; threads are shared among `at_a_time` runs."""

    out: Path
    common: tuple[str, ...]
    depth: int
    eval_batches: int
    draws: int
    at_a_time: int

    def overrides(self, job: Job) -> list[str]:
        """The configuration of a run."""
        own = RECIPES[job.recipe].overrides(self.depth, job.lr)
        return [*self.common, *own, f"--run.seed={job.seed}", f"--run.dir={self.out / 'runs' / job.name}"]

    def result_file(self, job: Job) -> Path:
        """Where the result of a finished and measured run lies."""
        return self.out / "results" / f"{job.name}.json"


class Runner:
    """Runs jobs and keeps their results.

    Args:
        planned: how many runs there will be at most, for the estimate of the time left.
        on_result: called after each run with the results so far.
        read_only: start nothing, only take what is finished.
    """

    def __init__(
        self,
        settings: Settings,
        planned: int,
        on_result: Callable[[dict[Job, dict]], None],
        *,
        read_only: bool = False,
    ):
        self.settings, self.planned, self.on_result, self.read_only = settings, planned, on_result, read_only
        self.results: dict[Job, dict[str, Any]] = {}
        self.failed: dict[Job, str] = {}
        self._worked, self._started = 0, time.monotonic()
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        n = settings.at_a_time
        self._slots = [",".join(map(str, cores[i::n] or cores)) for i in range(n)]
        for folder in ("runs", "results", "logs"):
            (settings.out / folder).mkdir(parents=True, exist_ok=True)

    def run(self, jobs: Sequence[Job]) -> None:
        """Run those that are not done yet; a failure is noted and the others go on.

        Raises:
            KeyboardInterrupt: after all runs in progress have saved their state.
        """
        waiting = [job for job in dict.fromkeys(jobs) if job not in self.failed and not self.read(job)]
        if self.read_only:
            return
        running: dict[int, tuple[Job, subprocess.Popen]] = {}  # by slot
        try:
            while waiting or running:
                for slot, cores in enumerate(self._slots):
                    if slot not in running and waiting:
                        running[slot] = (waiting[0], self._start(waiting.pop(0), cores))
                time.sleep(0.2)
                for slot, (job, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        self._finish(job, process.returncode)
        except BaseException:  # Ctrl-C above all
            self._stop([process for _, process in running.values()])
            raise

    def read(self, job: Job) -> bool:
        """Take the result of a run that is finished, and say whether it is.

        Raises:
            UsageError: it is of a run with other settings.
        """
        if job in self.results:
            return True
        file, settings = self.settings.result_file(job), self.settings
        if not file.exists():
            return False
        found = json.loads(file.read_text(encoding="utf-8"))
        differing = set(found["overrides"]) ^ set(settings.overrides(job))
        if differing := sorted(key for key in differing if not key.startswith("--run.dir=")):  # it may have been moved
            raise UsageError(
                f"{file} is of a run with other settings ({', '.join(differing)}); give the same ones again, or "
                "another --out"
            )
        if (found["eval_batches"], found["draws"]) != (settings.eval_batches, settings.draws):
            return False  # it is only measured again
        self.results[job] = found
        self.on_result(self.results)
        return True

    def _start(self, job: Job, cores: str) -> subprocess.Popen:
        settings = self.settings
        command = [sys.executable, str(WORKER), f"--result={settings.result_file(job)}"]
        command += [f"--eval_batches={settings.eval_batches}", f"--draws={settings.draws}"]
        command += [f"--cores={cores}"] if cores else []
        # Programs that another run has compiled are taken from there. Huge pages for what glibc allocates: without them
        # a fifth of the time on a CPU goes into page faults.
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(settings.out / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        } | os.environ
        with open(self._log(job), "a", encoding="utf-8") as log:
            # In a session of its own: the Ctrl-C of the terminal reaches it through `_stop` alone, once.
            return subprocess.Popen(
                [*command, "--", *settings.overrides(job)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def _log(self, job: Job) -> Path:
        return self.settings.out / "logs" / f"{job.name}.log"

    def _finish(self, job: Job, code: int) -> None:
        if code == 0 and self.read(job):
            self._worked += 1
            found = self.results[job]
            text = f"{found['bits_per_byte']:.4f} bits per byte, {found['steps']} steps in {found['seconds']:.0f} s"
        else:
            lines = self._log(job).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            self.failed[job] = " / ".join(lines[-LOG_LINES:])
            text = f"failed with code {code}: {self.failed[job]} (see {self._log(job)})"
        done = len(self.results) + len(self.failed)
        left = (time.monotonic() - self._started) / max(self._worked, 1) * max(self.planned - done, 0)
        print(f"[{done}/{self.planned}] {job.name}: {text} · about {left / 60:.0f} min left", flush=True)

    def _stop(self, processes: Sequence[subprocess.Popen]) -> None:
        """Have the runs save their state and wait for them; a second Ctrl-C ends them at once."""
        print("saving the runs in progress; the same command continues them", flush=True)
        for process in processes:
            process.send_signal(signal.SIGINT)
        try:
            for process in processes:
                process.wait()
        except KeyboardInterrupt:
            for process in processes:
                process.kill()
            raise

    def check(self) -> None:
        """Raises RunError if a run failed."""
        if self.failed:
            names = ", ".join(job.name for job in self.failed)
            raise RunError(f"{len(self.failed)} of the runs failed ({names}); see {self.settings.out / 'logs'}")
