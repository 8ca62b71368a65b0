"""Values so large that nobody can mean them are refused at once, and the largest that one can mean are not."""

from __future__ import annotations

import time

import pytest

from stackwise_jax.config import load_config, parse_bytes, validate
from stackwise_jax.config.bounds import BLOCKS, COUNTER, LARGEST, PHASES
from stackwise_jax.config.checks import parse_budget
from stackwise_jax.config.keys import hint_of, list_keys, split_optional
from stackwise_jax.curriculum import make_plan
from stackwise_jax.errors import UsageError


def refused(line: str) -> str:
    """What is said of the overrides, within seconds."""
    start = time.monotonic()
    with pytest.raises(UsageError) as error:
        config = load_config(None, [f"--{part}" for part in line.split()])
        validate(config)
        make_plan(config)
    assert time.monotonic() - start < 20 and len(str(error.value)) < 400
    return str(error.value)


WHOLE = [key.name for key in list_keys() if split_optional(key.hint)[0] is int]


@pytest.mark.parametrize("key", WHOLE)
def test_every_whole_number_has_a_largest_value(key):
    assert f"{key} is 1000000000000; write at most" in refused(f"{key}=1000000000000")
    assert key in refused(f"{key}=-1000000000000")
    assert key in refused(f"{key}={'9' * 100}")


@pytest.mark.parametrize("key", LARGEST)
def test_the_bounds_are_of_keys_that_exist(key):
    assert key in WHOLE or hint_of(key) is not None or key.rpartition(".")[0].endswith(("stages", "phases", "table"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("model.architecture.n_stacks=100000000", "model.architecture.n_stacks is 100000000; write at most 10000"),
        (
            "model.architecture.n_stacks=200 model.architecture.blocks_per_stack=200",
            "write at most 10,000 blocks in all",
        ),
        ("curriculum.rounds=1000000000", "curriculum.rounds is 1000000000; write at most 100000"),
        (
            "curriculum.plan=cycle curriculum.rounds=100000",
            "curriculum.rounds is 100000, with 4 phases each; write at most 25000",
        ),
        ("curriculum.steps=1000000000", "curriculum.steps comes to 4000000000 steps in all; write at most 2147483647"),
        ("curriculum.budget=1e30steps", "curriculum.budget comes to 1000000000000000000000000000000 steps in all"),
        ("curriculum.budget=9e99tokens", "curriculum.budget comes to"),
        (
            "curriculum.steps_growth=1000000 model.architecture.n_stacks=60",
            "curriculum.steps_growth is 1e+06 and gives phase",
        ),
        ("curriculum.steps_growth=1e300", "curriculum.steps_growth is 1e+300"),
        ('curriculum.plans=[{"rounds":1000000000}]', "curriculum.plans[0].rounds is 1000000000; write at most 100000"),
        ('curriculum.plan=custom curriculum.phases=[{"steps":0x7fffffff}]', "curriculum.phases[0].steps is"),
        (
            "curriculum.stages=[" + ",".join(["{}"] * 10_001) + "]",
            "curriculum.stages has 10,001 entries; write at most 10,000",
        ),
        (
            "curriculum.learn=[" + ",".join(["1"] * 10_001) + "]",
            "curriculum.learn has 10,001 entries; write at most 10,000",
        ),
        ("cache.host_budget=99999999999999999999TB", "cache.host_budget is"),
        (f"cache.host_budget={'9' * 5000}", "cache.host_budget is"),
        (f"memory.host={'9' * 5000}GB", "memory.host is"),
        (f"curriculum.budget={'9' * 5000}steps", "curriculum.budget is"),
        (f"run.name={'x' * 100_001}", "run.name has 100,001 characters; write at most 100,000"),
        ("optimizer.lr=1e999", "optimizer.lr is Infinity; write a finite number"),
        (f"optimizer.lr={'9' * 5000}", "optimizer.lr is Infinity; write a finite number"),
        (
            "model.architecture.n_stacks=2000 curriculum.trunk=adapt curriculum.adapters.strategy=progressive "
            "curriculum.adapters.rank_pattern=increasing",
            "curriculum.adapters.rank_pattern is increasing and makes the rank of stack 14 larger than 65536",
        ),
        (
            "model.architecture.n_stacks=60 curriculum.trunk=adapt curriculum.adapters.strategy=progressive "
            "curriculum.adapters.alpha_pattern=increasing",
            "curriculum.adapters.alpha_pattern is increasing and makes the alpha of stack 13 larger than",
        ),
        (
            "model.architecture.n_stacks=10000 model.architecture.blocks_per_stack=1",
            "model.architecture.n_stacks is 10000",
        ),
    ],
)
def test_what_nobody_can_mean_is_refused_before_it_is_built(line, expected):
    assert expected in refused(line)


def test_entries_of_lists_are_bounded_too():
    steps = COUNTER
    for key in ("curriculum.stages", "curriculum.phases", "curriculum.plans"):
        with pytest.raises(UsageError, match=rf"{key}\[0\].steps is {steps}; write at most 1000000000"):
            validate(load_config(None, [f"--{key}=[{{steps: {steps}}}]"]))
    with pytest.raises(UsageError, match=r"curriculum.plans\[0\].stages\[0\].optimizer.microbatches is"):
        validate(load_config(None, ["--curriculum.plans=[{stages: [{optimizer: {microbatches: 2000000}}]}]"]))


def test_large_models_and_long_runs_are_within_the_bounds():
    large = (
        "model.d_model=16384 model.n_heads=128 model.d_ff=65536 model.architecture.n_stacks=1000 data.seq_len=1048576"
    )
    config = load_config(None, [f"--{part}" for part in f"{large} curriculum.steps=2000000".split()])
    validate(config)
    assert len(make_plan(config).phases) == 1000 < BLOCKS < PHASES
    assert parse_bytes("900TiB", "x") == 900 * 2**40 and parse_budget("1e26 flops") == (10**26, "flops")


def test_ten_thousand_phases_are_made_in_seconds():
    start = time.monotonic()
    config = load_config(
        None, ["--curriculum.plan=cycle", "--curriculum.rounds=2500", "--curriculum.budget=1000000 steps"]
    )
    assert sum(phase.steps for phase in make_plan(config).phases) == 1_000_000
    assert time.monotonic() - start < 20
