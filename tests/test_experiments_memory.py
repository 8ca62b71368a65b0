"""The benchmarks of memory run at their smallest sizes, and the script for a GPU names files that are there."""

import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stackwise_jax.checkpoint import Progress

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
RUN = EXPERIMENTS / "h200" / "run.sh"


@pytest.fixture
def part(monkeypatch):
    """A module of experiments/, by name."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.syspath_prepend(str(RUN.parent))
    return importlib.import_module


def run(script: str, *options: str) -> dict:
    """The JSON object that an experiment prints with --smoke."""
    command = [sys.executable, str(EXPERIMENTS / script), *options, "--smoke", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_stackwise_bytes_are_flat_in_depth_and_as_planned():
    result = run("bench_memory.py", "--only", "stackwise streamed trunk", "--steps=1")
    shallow, deep = result["rows"]
    assert (shallow["blocks"], deep["blocks"]) == (4, 8)
    assert result["growth"]["stackwise streamed trunk"] == pytest.approx(1, abs=0.02)
    assert deep["predicted_device_bytes"] == pytest.approx(deep["device_bytes"], rel=0.1)
    assert deep["pinned_host_bytes"] > shallow["pinned_host_bytes"] > 0  # the trunk waits there


def test_streamed_is_measured_against_resident():
    # The benchmark itself compares the losses of both before it times them.
    (row,) = run("bench_streamed.py", "--batches=2", "--stacks=2")["rows"]
    assert row["microbatch_tokens"] == 32
    assert row["speed"] == pytest.approx(row["resident_remat_ms"] / row["streamed_ms"])
    assert row["speed_without_remat"] == pytest.approx(row["resident_ms"] / row["streamed_ms"])


def test_ladder_keeps_the_levers_of_the_rows_before():
    (row,) = run("memory_ladder.py", "--only", "7")["rows"]
    assert {"model.remat=True", "optimizer.name=adamw8bit", "memory.offload=all"} <= set(row["set"])
    assert 0 < row["device_bytes"] < row["pinned_host_bytes"] * 4


def test_a_row_that_fails_says_why(part):
    args = part("argparse").Namespace(smoke=True, set=["model.n_heads=3"])
    assert "n_heads" in part("one_phase").in_fresh_process("quickstart.yaml", {}, args)["error"]


def test_picture_draws_every_part_that_is_planned(part, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "memory.svg"
    small = ["--set=data.source=synthetic", "--set=tokenizer.kind=bytes", "--config=llama_7b_24gb_dry.yaml"]
    rows = part("memory_picture").main([*small, "--smoke", f"--out={path}"])
    assert rows["end to end, resident"]["device"]["learning weights"] > 0
    names = {name for row in rows.values() for name, size in row["device"].items() if size}
    drawn = path.read_text()
    assert all(f">{name}<" in drawn for name in names - part("memory_picture").SMALL)


def test_curriculum_is_stopped_softly_and_says_how_far_it_came(part, tmp_path, monkeypatch):
    curriculum = part("curriculum")
    free = itertools.chain([900, 700, 400], itertools.repeat(800))
    monkeypatch.setattr(curriculum, "available_host_bytes", lambda: next(free))
    waits = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: sys.exit(130)); time.sleep(60)"
    rc, taken = curriculum.train([sys.executable, "-c", waits], seconds=2, grace=30)
    assert rc == 130 and taken == 500
    hangs = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    rc, taken = curriculum.train([sys.executable, "-c", hangs], seconds=2, grace=0.5)
    assert rc == -signal.SIGKILL and taken == 0

    (tmp_path / "file").write_bytes(bytes(10))
    same = {"tokens": 5, "seconds": 1.0, "flops": 7, "peak_host_bytes": 10}
    results = [same | {"depth": d, "held_out_loss": 5 - d, "peak_device_bytes": d * 20e9} for d in (1, 2)]
    progress = Progress(number=3, phase=2, step=4, global_step=9, versions={}, results=results)
    found = curriculum.summary(progress, 4, tmp_path)
    assert found["held_out_loss"] == {"1": 4, "2": 3} and found["tokens"] == 10 and found["disk_bytes"] == 10
    assert found["within_goals"] == {"peak_device_bytes": False, "peak_host_bytes": True}


def test_script_for_a_gpu_names_what_is_there():
    assert subprocess.run(["bash", "-n", str(RUN)]).returncode == 0
    text, root = RUN.read_text(), EXPERIMENTS.parent
    files = re.findall(r"(?:tests|experiments|configs)/[\w/]+\.(?:py|yaml|sh)", text)
    assert len(files) > 15
    assert not [file for file in files if not (root / file).exists()]
    named = re.findall(r"\bllama_\w+\.yaml", text)
    assert named and all((root / "configs" / name).exists() for name in named)
