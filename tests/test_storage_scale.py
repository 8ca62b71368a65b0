"""Saving, loading, quantizing, merging and converting a rack of many stacks takes the memory of about two.

Each is done in a process of its own, first on a rack of two stacks, so that everything is loaded and compiled, then on
one of many: how far the resident size rises above what it was in between is what counts.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import pytest
from processes import environment
from tiny import tiny

from stackwise_jax.engine import Run, prepare
from stackwise_jax.engine.convert import Changes, convert_run
from stackwise_jax.engine.source import Source
from stackwise_jax.engine.weights import Weights, adapter_item, stack_item

MANY, FEW = 8, 2
STACK = 41_960_000  # bytes in fp32
WIDE = ["model.d_model=1024", "model.n_heads=8", "model.d_ff=2048", "curriculum.plan=custom"]


def save(directory: Path, n_stacks: int) -> Path:
    """A run that is about to begin: all stacks and their adapters are made and saved, one after the other."""
    phase = '[{"adapt": [%s], "train_head": false}]' % ", ".join(map(str, range(n_stacks)))  # noqa: UP031
    config = tiny(*WIDE, f"model.architecture.n_stacks={n_stacks}", f"curriculum.phases={phase}", "run.keep=1")
    run = Run(prepare(config, directory))
    run._open()
    phase = run.phases[0]
    run.weights.declare(phase)
    for item in map(adapter_item, phase.adapters):
        run.recorder.grow(item, "start")
        run.weights.drop(item)
    run.recorder.commit(phase=0, step=0)
    run.recorder.close()
    return directory


def load(directory: Path, fmt: str, place: str) -> None:
    """Every stack once, as a phase takes it up."""
    source = Source(directory)
    weights = Weights(source.rack, prepare(source.config, directory).placement, source.store, jax.random.key(0))
    weights.versions = source.versions
    for i in source.path:
        weights.ensure(stack_item(i), fmt, place)
        if fmt == "fp32":
            weights.drop(stack_item(i))


def work(name: str, directory: Path, n_stacks: int) -> None:
    if name == "save":
        save(directory / f"saved {n_stacks}", n_stacks)
    elif name.startswith("load"):
        load(directory / str(n_stacks), *name.split()[1:])
    else:
        changes = Changes(merge=True, fmt="nf4")
        convert_run(Source(directory / str(n_stacks)), directory / f"converted {n_stacks}", changes)


@pytest.fixture(scope="module")
def racks(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("racks")
    for n_stacks in (FEW, MANY):
        save(directory / str(n_stacks), n_stacks)
    return directory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("name", ["save", "load fp32 device", "load nf4 host", "merge and quantize"])
def test_the_peak_of_host_memory_does_not_grow_with_the_rack(name, racks):
    line = [sys.executable, __file__, name, str(racks)]
    env = environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back at once what is freed
    result = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    rise = int(result.stdout.splitlines()[-1])
    kept = MANY * STACK / 7.5 if name == "load nf4 host" else 0  # of all stacks in nf4
    print(f"{name}: the peak rose by {rise / 1e6:.1f} MB")
    assert rise - kept < 2 * STACK + 60e6 < MANY * STACK / 2


def status(field: str) -> int:
    """A size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    work(what, folder, FEW)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    work(what, folder, MANY)
    print(status("VmHWM") - before)
