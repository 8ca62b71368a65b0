"""What is asked of a rack when it is evaluated, and the standard error against the spread that it claims to tell."""

import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.config import StackWiseConfig
from stackwise_jax.curriculum import Noise, Objective, Phase
from stackwise_jax.engine.heldout import quotients
from stackwise_jax.engine.step import batch_metrics
from stackwise_jax.evaluation.held_out import standard_error, task_of

TRIALS = 600


def drawn(rng, n_draws, n_batches, kind):
    """The sums of each batch in each draw: batches of unlike mean and spread, and for mlm unlike numbers of bytes."""
    sizes_N = np.linspace(50, 150, n_batches)
    noise_DN = rng.exponential(size=(n_draws, n_batches)) if kind == "skewed" else rng.normal(size=(n_draws, n_batches))
    bytes_DN = np.tile(1000.0 + 10 * sizes_N, (n_draws, 1))
    if kind == "mlm":
        bytes_DN = rng.poisson(150, size=(n_draws, n_batches)).astype(float)
    nll_DN = bytes_DN * np.linspace(1.0, 2.0, n_batches) + sizes_N * noise_DN
    return [[{"nll": n, "bytes": b} for n, b in zip(*row, strict=True)] for row in zip(nll_DN, bytes_DN, strict=True)]


def bits(sums_DN):
    ratio = [sum(batch["nll"] for batch in row) / sum(batch["bytes"] for batch in row) for row in sums_DN]
    return float(np.mean(ratio)) / math.log(2)


@pytest.mark.parametrize(
    ("n_draws", "n_batches", "kind"),
    [(2, 12, "normal"), (2, 40, "skewed"), (4, 12, "skewed"), (3, 12, "mlm"), (2, 1, "normal"), (3, 2, "normal")],
)
def test_the_standard_error_is_that_of_many_evaluations(n_draws, n_batches, kind):
    rng = np.random.default_rng(0)
    trials = [drawn(rng, n_draws, n_batches, kind) for _ in range(TRIALS)]
    spread, errors = np.std([bits(sums_DN) for sums_DN in trials]), np.array(list(map(standard_error, trials)))
    assert errors.mean() == pytest.approx(spread, rel=0.1)
    if n_batches >= 12:  # and a single one is not far off, as that of two figures would be
        assert np.mean(np.abs(errors / spread - 1) < 0.35) > 0.85


def test_one_draw_says_nothing_of_it_and_equal_draws_have_none():
    sums_DN = drawn(np.random.default_rng(0), 1, 5, "normal")
    assert standard_error(sums_DN) is None
    assert standard_error(sums_DN * 3) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_quotients_of_one_token_are_its_own_and_of_none_are_zero(count):
    sums = dict.fromkeys(("nll", "tokens", "bytes", "correct", "predicted"), float(count))
    for found in (quotients([sums]), batch_metrics({name: jnp.float32(value) for name, value in sums.items()})):
        assert (float(found["loss"]), float(found["accuracy"])) == (count, count)
        assert float(found["bits_per_byte"]) == pytest.approx(count / math.log(2))
    assert quotients([sums] * 3)["loss"] == count
    assert quotients([sums, sums | {"nll": 3.0, "tokens": 3.0}])["tokens"] == count + 3


def test_another_objective_comes_with_its_own_attention_and_noise():
    noise = Noise(kind="range", low=0.1, high=0.9)
    own = {"objective": Objective(kind="diffusion"), "noise": noise, "attention_mode": "bidirectional"}
    loaded = SimpleNamespace(phase=Phase(name="any", path=(0,), train_head=True, **own), config=StackWiseConfig())
    found = {kind: task_of(loaded, kind) for kind in ("clm", "mlm", "diffusion", None)}
    assert {kind: task.attention_mode for kind, task in found.items()} == {
        "clm": "causal", "mlm": "bidirectional", "diffusion": "bidirectional", None: "bidirectional",
    }  # fmt: skip
    assert [found[kind].noise.kind for kind in found] == ["none", "fixed", "elbo", "elbo"]
    assert found["mlm"].noise.low == found["mlm"].noise.high == StackWiseConfig().objective.mask_fraction
