"""The losses of two small runs, as they were when the engine was known to be right.

They change when initial values, data order, objective, optimizer or schedule change. Write them anew, on purpose, with
`python tests/test_golden.py`.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import losses, tiny, train

from stackwise_jax.config import StackWiseConfig, load_config
from stackwise_jax.engine import Interrupted, NullReporter, StopFlag

pytestmark = pytest.mark.optimized

GOLDEN = Path(__file__).parent / "golden"
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def two_stacks() -> tuple[StackWiseConfig, int]:
    """Twelve steps: two stacks, six each."""
    return tiny("curriculum.steps=6"), 12


def quickstart() -> tuple[StackWiseConfig, int]:
    """The first five steps of the quick start with a smaller batch, on text that is the same for every Python."""
    changes = "data.source=synthetic data.synthetic_tokens=50000 data.batch_size=2 data.seq_len=64 run.log_every=1"
    changes += " curriculum.steps=200 run.eval_batches=1 run.save_every=0 run.tensorboard=false"
    return load_config(QUICKSTART, [f"--{change}" for change in changes.split()]), 5


RUNS = {"two_stacks": two_stacks, "quickstart": quickstart}


def first_losses(name: str, run_dir: Path) -> list[float]:
    """The losses of a run up to its last step of interest."""
    config, n_steps = RUNS[name]()
    stop = StopFlag()

    class StopAtTheEnd(NullReporter):
        def step(self, row):
            if row["global_step"] >= n_steps:
                stop.set()

    with contextlib.suppress(Interrupted):
        train(config, run_dir, reporter=StopAtTheEnd(), stop=stop)
    return losses(run_dir)[:n_steps]


def version() -> str:
    """Major and minor version of jax: patches do not change numbers."""
    return ".".join(jax.__version__.split(".")[:2])


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_the_golden_run(name, tmp_path):
    by_version = json.loads((GOLDEN / f"{name}.json").read_text())
    found = first_losses(name, tmp_path / "run")
    # Another processor or another jax adds in another order; anything else moves the losses by much more than this.
    golden = by_version.get(version(), list(by_version.values())[-1])
    np.testing.assert_allclose(found, golden, rtol=1e-5 if version() in by_version else 1e-4)
    assert found[-1] < found[0]


if __name__ == "__main__":
    for run_name in RUNS:
        path = GOLDEN / f"{run_name}.json"
        table = json.loads(path.read_text()) if path.exists() else {}
        with tempfile.TemporaryDirectory() as directory:
            table[version()] = first_losses(run_name, Path(directory) / "run")
        path.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
