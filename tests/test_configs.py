"""Every shipped configuration loads, makes its plan, and traces the training step of each of its phases."""

import functools
from pathlib import Path

import jax
import pytest

from stackwise_jax.config import load_config, validate
from stackwise_jax.engine import prepare
from stackwise_jax.engine.dryrun import abstract_step
from stackwise_jax.engine.resident import step_spec
from stackwise_jax.engine.step import train_step
from stackwise_jax.engine.weights import Weights
from stackwise_jax.engine.window import Window

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
# The text decides nothing about shapes but the vocabulary, and synthetic text is read at once.
TEXT = ["--data.source", "synthetic", "--data.synthetic_tokens", "60000"]
FRESH = ["--run.init_from", "null"]  # the run to start from is not there, and changes no shape


def test_there_are_configurations():
    plans = {"rackwise", "append", "prepend", "grow", "keep_last", "cycle", "independent", "fusion", "joint", "custom"}
    plans |= {"layerwise", "blockwise", "quickstart", "adapters", "depth_time", "input_time", "finetune"}
    assert plans <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_phase_traces(path, tmp_path):
    validate(load_config(path))
    setup = prepare(load_config(path, TEXT + FRESH), tmp_path)
    weights = Weights(setup.rack, setup.placement, None, jax.random.key(0))
    traced = set()
    for phase in setup.plan.phases:
        window = Window(setup.rack, phase)
        spec = step_spec(setup.task(phase), phase, window)
        if spec in traced:
            continue  # equal specs are one program
        traced.add(spec)
        state, frozen, data, constants = abstract_step(setup, weights, spec, phase, window)
        new_state, metrics = jax.eval_shape(functools.partial(train_step, spec), state, frozen, data, constants)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        assert metrics["loss"].shape == ()
