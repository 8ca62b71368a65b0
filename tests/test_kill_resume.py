"""A run that is killed with SIGKILL, or stopped by a signal, and started again ends as one that never was."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import arguments, assert_same_end, environment, finish, progress, rows, start

pytestmark = pytest.mark.slow

Moment = Callable[[Path], bool]  # whether a run stands where it is to be killed, seen from its directory


def names(directory: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in directory.glob(pattern))


def within_a_step(phase: str, step: int) -> Moment:
    """The metrics of this step (or, where that was missed, of a later one) were written last; the next is running."""

    def moment(run_dir: Path) -> bool:
        last = rows(run_dir)[-1:]
        return bool(last) and last[0]["phase"] == phase and last[0]["step"] >= step and "lr" in last[0]

    return moment


def within_a_save(item: str) -> Moment:
    """Some arrays of a version of an item are on the disk and the version is not yet there under its name."""
    return lambda run_dir: bool(names(run_dir / "checkpoints" / item, "????????.tmp/arrays*/*"))


def before_the_record(item: str) -> Moment:
    """A version of an item stands whole and no record names it."""

    def moment(run_dir: Path) -> bool:
        saved = names(run_dir / "checkpoints" / item, "????????")
        records = names(run_dir / "checkpoints" / "progress", "????????.json")
        return bool(saved and records) and saved[-1] > "00000001" and f"{saved[-1]}.json" > records[-1]

    return moment


def at_the_end_of(phase: str, steps: int) -> Moment:
    """All steps of the phase are done and measured, and its end is not recorded."""

    def moment(run_dir: Path) -> bool:
        last = rows(run_dir)[-1:]
        return bool(last) and last[0]["phase"] == phase and last[0]["step"] == steps and "held_out_loss" in last[0]

    return moment


def at_the_start_of(index: int) -> Moment:
    """The end of the phase before is recorded: the next is set up, its cache filled or advanced."""

    def moment(run_dir: Path) -> bool:
        last = progress(run_dir)
        return last is not None and (last.phase, last.step) == (index, 0)

    return moment


def after(seconds: float) -> Moment:
    """So long after the start of the process, wherever it then is."""
    due = []

    def moment(run_dir: Path) -> bool:
        due.append(due[0] if due else time.monotonic() + seconds)
        return time.monotonic() >= due[0]

    return moment


def signal_at(process, run_dir: Path, moment: Moment, number: int, timeout: float = 240) -> bool:
    """Send a signal at the moment; False where the process ended before. It stands still while it is looked at."""
    deadline = time.monotonic() + timeout
    while process.poll() is None:
        assert time.monotonic() < deadline, "the moment never came"
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        hit = moment(run_dir)
        if hit:
            process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        if hit:
            return True
        time.sleep(0.002)
    return False


def kill_at(process, run_dir: Path, moment: Moment) -> bool:
    """Kill the process at the moment; False where it ended before."""
    if not signal_at(process, run_dir, moment, signal.SIGKILL):
        return False
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    return environment(compiled=tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, env) -> Callable[[dict], Path]:
    """Gives the directory of a run of some configuration that was never disturbed."""
    done: dict[str, Path] = {}

    def directory(changes: dict) -> Path:
        key = repr(changes)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("whole") / "run"
            finish(start("train", *arguments(changes, dir=done[key]), env=env))
        return done[key]

    return directory


def random_moments(seed: int, n: int) -> list[Moment]:
    """Random times: soon after the start, and over the seconds in which a run works."""
    draw = random.Random(seed)
    return [after(draw.uniform(0.5, 8.0)) for _ in range(n)]


HOST = {"cache.kind": "host"}
CASES = {
    "stackwise clm, cache in host memory": (
        HOST,
        [
            within_a_save("stacks/001"),  # before the first record
            within_a_step("stack 0", 1),
            within_a_save("optimizer"),
            at_the_end_of("stack 0", 12),
            at_the_start_of(1),
            before_the_record("stacks/001"),
            within_a_step("stack 2", 7),
            *random_moments(seed=1, n=2),
        ],
    ),
    "append mlm, fixed corruption, cache on disk, dropout": (
        {
            "curriculum.plan": "append",
            "objective.kind": "mlm",
            "objective.corruption": "fixed",
            "cache.kind": "disk",
            "model.dropout": 0.2,
            "optimizer.microbatches": 2,
        },
        [
            within_a_step("stack 1", 4),
            within_a_save("head"),
            before_the_record("stacks/002"),
            *random_moments(seed=2, n=1),
        ],
    ),
    "stackwise diffusion, fresh corruption, trunk in bf16, muon": (
        {
            "objective.kind": "diffusion",
            "cache.kind": "recompute",
            "curriculum.frozen": "bf16",
            "optimizer.name": "muon",
            "model.dropout": 0.1,
        },
        [within_a_step("stack 0", 7), at_the_end_of("stack 1", 12), *random_moments(seed=3, n=1)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_moment_a_run_ends_as_if_it_never_was(case, tmp_path, env, whole):
    changes, moments = CASES[case]
    whole(changes)  # first, so that the programs are compiled
    killed, kills, number = tmp_path / "killed", 0, 0
    for moment in moments:
        process = start("train", *arguments(changes, dir=killed), env=env)
        if not kill_at(process, killed, moment):
            finish(process)
            continue
        kills += 1
        last = progress(killed)
        assert (last.number if last else 0) >= number  # nothing that was committed is lost
        number = last.number if last else 0
    last = progress(killed)
    begun_unfinished = last is not None and not last.finished
    finish(start("train", *arguments(changes, dir=killed), env=env))
    assert kills >= len(moments) - 2  # the random ones may come too late
    assert_same_end(killed, whole(changes))
    if begun_unfinished:  # what the kills left half done is gone
        assert not [path for path in killed.rglob("*") if path.name.endswith(".tmp")]


DISK = {"memory.offload": "all", "memory.offload_to": "disk", "memory.stack_inputs": "host"}


@pytest.mark.parametrize("changes", [HOST, HOST | DISK], ids=["resident", "stacks come and go"])
def test_stopped_by_a_signal_a_run_saves_says_so_and_goes_on(changes, tmp_path, env, whole):
    stopped = tmp_path / "stopped"
    # Ctrl-C between two checkpoints, then SIGTERM in the next phase: both leave a checkpoint of the very step.
    for number, (phase, step) in ((signal.SIGINT, ("stack 0", 4)), (signal.SIGTERM, ("stack 1", 4))):
        process = start("train", *arguments(changes, dir=stopped), env=env)
        assert signal_at(process, stopped, within_a_step(phase, step), number)
        _, err = finish(process, code=130)
        told = re.search(rf"stopped at phase '{phase}', step (\d+); the same command continues {stopped}", err)
        last = progress(stopped)
        assert told and last is not None and (last.phase, last.step) == (int(phase[-1]), int(told[1]))
        assert last.step > step

    # Twice: at once, without a save.
    process = start("train", *arguments(changes, dir=stopped), env=env)
    assert signal_at(process, stopped, within_a_step("stack 2", 1), signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, code=130)
    assert "once more to stop at once" in err or "stopped at phase" in err

    out, _ = finish(start("train", *arguments(changes, dir=stopped), env=env))
    assert f"continuing {stopped}" in " ".join(out.split())
    assert_same_end(stopped, whole(changes))


def test_what_a_kill_before_the_first_record_leaves_is_begun_anew(tmp_path, env, whole):
    """The directory is laid down in pieces; config.yaml comes last and makes it a run."""
    early = tmp_path / "early"
    (early / "tokenizer").mkdir(parents=True)
    (early / "phases.json.tmp").write_text("[")
    finish(start("train", *arguments(HOST, dir=early), env=env))
    assert_same_end(early, whole(HOST))


DIFFUSION = {"objective.kind": "diffusion", "objective.noise": "elbo"}
ADAPT = {"curriculum.trunk": "adapt", "curriculum.adapters.merge": "true", "curriculum.adapters.dropout": 0.1}
PLANS = {
    "append": ADAPT | {"curriculum.frozen": "bf16"},
    "prepend": DIFFUSION | {"objective.time": "depth", "objective.noise": "range", "curriculum.consistency": 0.1},
    "grow": {"curriculum.init": "copy", "curriculum.optimizer_state": "keep"},
    "cycle": {"curriculum.rounds": 2, "optimizer.name": "muon", "memory.offload": "trunk"},
    "fusion": {
        "curriculum.learn": "[0, 2]",
        "curriculum.trunk": "adapt",
        "curriculum.frozen": "nf4",
        "memory.offload": "all",
        "memory.offload_to": "disk",
        "memory.stack_inputs": "host",
    },
    "custom": {
        "curriculum.phases": "[{name: a, path: [0, 1], train: [0, 1], train_embed: true}, {name: b, path: [0, 1], "
        "adapt: [0, 1]}, {name: c, path: [2, 0, 1], train: [2], adapt: [1], merge_adapters: true, init: copy}]"
    },
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_killed_after_a_border_ends_as_if_it_never_was(plan, tmp_path, env, whole):
    """Killed in the middle of its last phase: what the borders made, merged and handed on is found again."""
    changes = {"curriculum.plan": plan, "curriculum.steps": 6, "run.eval_every": 0, **PLANS[plan]}
    phases = json.loads((whole(changes) / "phases.json").read_text())
    killed = tmp_path / "killed"
    process = start("train", *arguments(changes, dir=killed), env=env)
    assert kill_at(process, killed, within_a_step(phases[-1]["name"], 3))
    last = progress(killed)
    assert last is not None and not last.finished
    finish(start("train", *arguments(changes, dir=killed), env=env))
    assert_same_end(killed, whole(changes))


def test_the_70b_curriculum_in_small_is_killed_and_trained_through_all_80_stages(tmp_path, env):
    config, killed = Path(__file__).parent.parent / "configs" / "llama_70b_h200_dry.yaml", tmp_path / "killed"
    line = ["--config", str(config), "--run.dir", str(killed)]
    assert kill_at(start("train", *line, env=env), killed, within_a_step("stack 37", 1))
    last = progress(killed)
    assert last is not None and last.phase == 37
    finish(start("train", *line, env=env))
    ends = [row for row in rows(killed) if "held_out_loss" in row]
    assert [row["phase"] for row in ends] == [f"stack {i}" for i in range(80)]
    assert progress(killed).finished
