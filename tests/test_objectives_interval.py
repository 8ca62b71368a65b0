"""The diffusion bound over an interval of shares: partial bounds that add up, and what a single one draws.

Legend: N draws.
"""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import DIFFUSION, ELBO, VOCAB, assert_same, batch_of, examples_of, mass

from stackwise_jax.curriculum.phase import Noise
from stackwise_jax.objectives import max_targets
from stackwise_jax.objectives.corruption import hidden_count, hidden_weight
from stackwise_jax.objectives.schedules import SCHEDULES

PARTITIONS = [(0.0, 0.5, 1.0), (0.0, 1 / 3, 2 / 3, 1.0), (0.0, 0.05, 0.3, 0.31, 0.8, 1.0)]
U = (np.arange(200_000, dtype=np.float32) + 0.5) / 200_000


def parts_of(borders, schedule="linear") -> list[Noise]:
    return [Noise(kind="elbo", low=a, high=b, schedule=schedule) for a, b in itertools.pairwise(borders)]


@partial(jax.jit, static_argnums=0)
def _draw(noise, u_N, n_real):
    n_N = hidden_count(noise, u_N, n_real)
    return n_N, hidden_weight(noise, n_N, n_real)


def draw(noise, u_N, n_real) -> tuple[np.ndarray, np.ndarray]:
    """The counts of many draws and the weight of each."""
    n_N, weights_N = _draw(noise, u_N, np.int32(n_real))
    return np.asarray(n_N), np.asarray(weights_N)


def toy_model(size: int) -> dict:
    """An order-agnostic model: nll of position i is any number, given what is hidden."""
    rng = np.random.default_rng(size)
    masks = [hidden for n in range(1, size + 1) for hidden in itertools.combinations(range(size), n)]
    return {(i, hidden): rng.exponential() for hidden in masks for i in hidden}


def partial_bound(noise: Noise, nll: dict, size: int) -> float:
    """The expectation of a sequence's weighted nll, over the counts that are drawn and every mask of that count."""
    drawn, weights = draw(noise, U, size)
    bound = 0.0
    for n in range(1, size + 1):
        at_n = drawn == n
        masks = list(itertools.combinations(range(size), n))
        per_mask = np.mean([sum(nll[i, hidden] for i in hidden) for hidden in masks])
        bound += weights[at_n].sum(dtype=np.float64) / len(U) * per_mask
    return bound


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("borders", PARTITIONS)
@pytest.mark.parametrize("size", [1, 4, 5])
def test_partial_bounds_add_up_to_the_mean_over_all_orders(name, borders, size):
    nll = toy_model(size)
    per_order = [
        sum(nll[i, tuple(sorted(order[step:]))] for step, i in enumerate(order))
        for order in itertools.permutations(range(size))
    ]
    parts = [partial_bound(noise, nll, size) for noise in parts_of(borders, name)]
    np.testing.assert_allclose(sum(parts), np.mean(per_order), rtol=2e-4)
    np.testing.assert_allclose(sum(parts), partial_bound(Noise(kind="elbo", schedule=name), nll, size), rtol=2e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_counts_of_an_interval_follow_the_schedule_within_it(name):
    noise, inside = Noise(kind="elbo", low=0.3, high=0.8, schedule=name), np.arange(4, 9)
    drawn, weights = draw(noise, U, 10)
    p = mass(name, inside, 10)
    p = p / p.sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=11)[4:9] / len(U), p, atol=2e-5)
    assert drawn.min() == 4 and drawn.max() == 8
    for n, p_n in zip(inside, p, strict=True):
        np.testing.assert_allclose(weights[drawn == n], 1 / (n * p_n), rtol=1e-5)


@pytest.mark.parametrize("borders", PARTITIONS)
def test_intervals_that_touch_share_every_count_once(borders):
    for n_real in (1, 2, 3, 7, 10, 30, 257, 1000, 4095):
        seen = [draw(noise, U[::10], n_real)[0] for noise in parts_of(borders)]
        counts = [n for drawn in seen for n in np.unique(drawn[drawn > 0])]
        assert counts == sorted(set(counts))
        assert counts == [*range(1, n_real + 1)]


def whole_mass(schedule: str, n, total):
    """P(ceil(m(u) * total) = n), as written for a bound that has no intervals."""
    if schedule == "linear":
        return jnp.ones_like(n) / total
    if schedule == "exponential":
        c = math.expm1(3.0)
        return jnp.log1p(c / (total + c * (n - 1))) / 3.0
    a2, b2 = 0.5 * n / total, 0.5 * (n - 1) / total
    apart = (0.5 / total) / (jnp.sqrt(a2 * (1.0 - b2)) + jnp.sqrt(b2 * (1.0 - a2)))
    return 4.0 / math.pi * jnp.arcsin(apart)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_whole_interval_is_bitwise_the_bound_without_intervals(name):
    noise, u_N = Noise(kind="elbo", low=0.0, high=1.0, schedule=name), jnp.asarray(U[::100])
    n_real_N = jnp.arange(len(u_N), dtype=jnp.int32) % 300
    n_N, total_N = hidden_count(noise, u_N, n_real_N), n_real_N.astype(jnp.float32)
    expected_N = jnp.ceil(SCHEDULES[name].share(u_N) * total_N).astype(jnp.int32)
    np.testing.assert_array_equal(n_N, jnp.minimum(jnp.maximum(expected_N, 1), n_real_N))
    n_N, total_N = jnp.maximum(n_N, 1), jnp.maximum(total_N, 1)
    expected_N = 1.0 / (n_N.astype(jnp.float32) * whole_mass(name, n_N.astype(jnp.float32), total_N))
    np.testing.assert_array_equal(hidden_weight(noise, n_N, n_real_N), expected_N)


@pytest.mark.parametrize("name", SCHEDULES)
def test_weights_of_real_batches_average_to_the_interval_s_part_of_each_token(name):
    """With nll = 1 everywhere a count contributes one nat, whatever the schedule: the mean is that of the counts."""
    examples = examples_of([32, 20, [9, 4], 5] * 256)
    for noise, n_counts in zip(parts_of((0.0, 0.4, 1.0), name), ([12, 8, 5, 2], [20, 12, 8, 3]), strict=True):
        per_row = np.concatenate([batch_of(DIFFUSION, noise, examples, visit=v).weights_BT.sum(1) for v in range(4)])
        expected = np.tile(n_counts, 1024)
        assert abs((per_row - expected).mean()) < 4 * max((per_row - expected).std(), 1e-4) / math.sqrt(len(per_row))


def test_a_row_too_short_for_the_interval_hides_nothing_and_still_counts():
    examples, noise = examples_of([1, 2, 32, 0]), Noise(kind="elbo", low=0.55, high=0.95)
    batch = batch_of(DIFFUSION, noise, examples)
    n_hidden = (batch.weights_BT > 0).sum(1)
    assert n_hidden[[0, 1, 3]].tolist() == [0, 0, 0] and 17 < n_hidden[2] <= 30
    assert np.isfinite(batch.weights_BT).all() and batch.hidden_B[[0, 1, 3]].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(batch.inputs_BT[:2], examples.tokens_BT[:2])
    np.testing.assert_array_equal(batch.counts_BT, examples.segment_ids_BT != 0)


def test_max_targets_bounds_every_interval():
    for noise in (noise for borders in PARTITIONS for noise in parts_of(borders)):
        for seq_len in (1, 3, 10, 32, 257):
            assert draw(noise, U[::10], seq_len)[0].max() <= max_targets(DIFFUSION, noise, seq_len)
    assert max_targets(DIFFUSION, ELBO, 10) == 10
    assert max_targets(DIFFUSION, Noise(kind="elbo", high=0.25), 10) == 3


def test_masks_are_those_of_example_level_and_seed():
    examples = examples_of([32, 20, [9, 9], 17])
    mirrored_BT = VOCAB.ordinary_ids[0] + VOCAB.ordinary_ids[-1] - examples.tokens_BT
    other = examples._replace(tokens_BT=np.where(examples.segment_ids_BT > 0, mirrored_BT, VOCAB.pad_id))
    levels = [Noise(kind="fixed", low=s, high=s) for s in (0.3, 0.6)] + parts_of((0.1, 0.4, 0.9))
    for noise in levels:
        chosen = [batch_of(DIFFUSION, noise, given, seed=5).weights_BT for given in (examples, other)]
        np.testing.assert_array_equal(*chosen)
        assert (batch_of(DIFFUSION, noise, examples, seed=6).weights_BT != chosen[0]).any(1).all()
    for a, b in itertools.pairwise(batch_of(DIFFUSION, noise, examples, seed=5) for noise in levels):
        assert (a.inputs_BT != b.inputs_BT).any(1).all()
    assert_same(*(batch_of(DIFFUSION, levels[0], examples, seed=5) for _ in range(2)))
