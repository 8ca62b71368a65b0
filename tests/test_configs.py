"""Every shipped configuration loads, makes its plan, and traces the training step of each of its phases."""

import dataclasses
import functools
from pathlib import Path

import jax
import pytest

from stackwise_jax.config import load_config, validate
from stackwise_jax.engine import prepare
from stackwise_jax.engine.dryrun import abstract_step
from stackwise_jax.engine.programs import bare
from stackwise_jax.engine.resident import step_spec
from stackwise_jax.engine.step import train_step
from stackwise_jax.engine.weights import Weights, item_format, stack_item
from stackwise_jax.engine.window import Window

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
# The text decides nothing about shapes but the vocabulary, and synthetic text is read at once.
TEXT = ["--data.source", "synthetic", "--data.synthetic_tokens", "60000"]
BYTES = ["--tokenizer.kind", "bytes"]  # no text is needed for the size of its vocabulary
FRESH = ["--run.init_from", "null"]  # the run to start from is not there, and changes no shape


def test_there_are_configurations():
    plans = {"rackwise", "append", "prepend", "grow", "keep_last", "cycle", "independent", "fusion", "joint", "custom"}
    large = ("llama_70b_h200", "llama_70b_h200_128k", "llama_7b_24gb", "llama_1b_t4")
    plans |= {name + dry for name in large for dry in ("", "_dry")}
    plans |= {"layerwise", "blockwise", "quickstart", "adapters", "depth_time", "input_time", "finetune"}
    assert plans <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_phase_traces(path, tmp_path):
    config = load_config(path)
    trained = config.tokenizer.kind == "sentencepiece" and config.model.vocab_size is not None
    given = load_config(path, TEXT + FRESH + (BYTES if trained else []))
    validate(given if config.data.source == "text" else config)  # the text of the large ones is given by the user
    setup = prepare(given, tmp_path)
    weights = Weights(setup.rack, setup.placement, None, jax.random.key(0))
    traced = set()
    for phase in setup.plan.phases:
        window = Window(setup.rack, phase)
        spec = step_spec(setup.task(phase), phase, window)
        spec = dataclasses.replace(spec, groups=tuple(bare(stack) for stack in spec.groups))
        known = spec, tuple(item_format(phase, stack_item(i), weights.master) for i in phase.window)
        if known in traced:
            continue  # equal specs are one program
        traced.add(known)
        state, frozen, data, constants = abstract_step(setup, weights, spec, phase, window)
        new_state, metrics = jax.eval_shape(functools.partial(train_step, spec), state, frozen, data, constants)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        assert metrics["loss"].shape == ()
