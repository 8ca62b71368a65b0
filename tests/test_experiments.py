"""The benchmarks run at their smallest sizes and print JSON last, and what holds at any size holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def run(script: str, *options: str) -> dict:
    """The JSON object that an experiment prints with --smoke."""
    command = [sys.executable, str(EXPERIMENTS / script), *options, "--smoke", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_engine_does_what_the_bare_step_does():
    # The benchmark itself compares the losses of both before it times them.
    result = run("bench_engine.py")
    assert result["seconds_per_step"].keys() == {"bare", "bare, full logits", "step", "loop"}
    assert all(seconds > 0 for seconds in result["seconds_per_step"].values())
    assert result["overhead"]["bare"] == {"wall": 0, "cpu": 0}


def test_steps_of_stacks():
    rows = run("bench_stacks.py", "step")["step"]
    assert [row[""] for row in rows] == ["end to end", "first stack", "last stack"]
    assert rows[2]["MiB"] < rows[1]["MiB"] < rows[0]["MiB"]


@pytest.mark.slow
def test_learning_state_and_compilations_do_not_grow_with_depth():
    result = run("bench_stacks.py", "memory", "compile")
    rows = {(row["plan"], row["blocks"], row["phase"]): row for row in result["memory"]}
    shallow, deep, deepest = (rows["stackwise", *place] for place in ((4, "stack 1"), (8, "stack 1"), (8, "stack 3")))
    end_to_end = rows["rackwise", 4, "rack"]
    same = ("learning state", "arguments", "outputs", "temporaries", "total")
    assert [shallow[name] for name in same] == [deep[name] for name in same] == [deepest[name] for name in same]
    assert shallow["learning state"] < end_to_end["learning state"] < rows["rackwise", 8, "rack"]["learning state"]
    compiled = {(row["plan"], row["blocks"]): row["compiled steps"] for row in result["compile"]}
    assert compiled == {("rackwise", 4): 1, ("rackwise", 8): 1, ("stackwise", 4): 2, ("stackwise", 8): 2}
    in_runs = {(row["plan"], row["blocks"]): row["compilations"] for row in result["runs"]}
    assert in_runs["rackwise", 8] == in_runs["rackwise", 16]
    assert in_runs["stackwise", 8] == in_runs["stackwise", 16]


def test_learning_from_the_markov_source():
    result = run("learn_markov.py", "--job", "append")
    assert 0.39 < result["entropy"] < 0.41 and result["chance"] == 1 / 64
    (row,) = result["jobs"]
    assert row["job"] == "append" and 0 < row["held-out loss"] < 6
