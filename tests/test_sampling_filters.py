"""The filters hold against a plain reading of their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.objectives.batch import Vocab
from stackwise_jax.sampling.filters import NO_ID, Filters, allowed_ids, check_ids, filter_logits, sample_ids

ALL_V = np.ones(8, bool)


@pytest.fixture
def logits_NV():
    return jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)) * 2, jnp.float32)


def kept(logits_NV):
    return np.isfinite(np.asarray(logits_NV))


def test_defaults_change_nothing_but_the_origin(logits_NV):
    best_N1 = logits_NV.max(-1, keepdims=True)
    np.testing.assert_array_equal(filter_logits(logits_NV, ALL_V, Filters()), logits_NV - best_N1)


def test_temperature_divides(logits_NV):
    below_NV = logits_NV - logits_NV.max(-1, keepdims=True)
    np.testing.assert_allclose(filter_logits(logits_NV, ALL_V, Filters(temperature=0.5)), below_NV * 2, rtol=1e-6)


def test_temperature_zero_is_the_argmax_of_what_is_allowed(logits_NV):
    allowed_V = ALL_V.copy()
    allowed_V[int(logits_NV[0].argmax())] = False
    ids_N = sample_ids(jax.random.key(1), logits_NV, allowed_V, Filters(temperature=0.0, top_k=3, top_p=0.2))
    np.testing.assert_array_equal(ids_N, np.where(allowed_V, logits_NV, -np.inf).argmax(-1))
    assert kept(filter_logits(logits_NV, allowed_V, Filters(temperature=0.0))).sum() == 5


@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_top_k_keeps_the_k_likeliest(logits_NV, k):
    found_NV = kept(filter_logits(logits_NV, ALL_V, Filters(top_k=k)))
    rank_NV = np.argsort(np.argsort(-np.asarray(logits_NV)))
    np.testing.assert_array_equal(found_NV, rank_NV < k)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits_NV, p, temperature):
    found_NV = kept(filter_logits(logits_NV, ALL_V, Filters(temperature=temperature, top_p=p)))
    probs_NV = np.asarray(jax.nn.softmax(logits_NV / temperature))
    for probs_V, found_V in zip(probs_NV, found_NV, strict=True):
        inside = np.sort(probs_V[found_V])
        assert set(np.flatnonzero(found_V)) == set(np.argsort(-probs_V)[: len(inside)])
        assert inside.sum() >= p - 1e-6
        assert inside[1:].sum() < p  # without its least likely token the set would not reach p


def test_top_p_counts_only_what_top_k_left():
    logits_1V = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))
    found_1V = kept(filter_logits(logits_1V, ALL_V[:4], Filters(top_k=2, top_p=0.55)))
    np.testing.assert_array_equal(found_1V, [[True, False, False, False]])  # 0.4 / 0.7 reaches 0.55


def test_special_ids_and_vocabulary_padding_are_never_allowed():
    vocab = Vocab(size=10, mask_id=9, pad_id=0, eos_id=2, special_ids=(0, 1, 2))  # a mask id behind the pieces
    np.testing.assert_array_equal(np.flatnonzero(allowed_ids(vocab, 16)), [3, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(np.flatnonzero(allowed_ids(vocab, 16, also=(2,))), [2, 3, 4, 5, 6, 7, 8])
    logits_NV = jnp.zeros((500, 16)).at[:, jnp.array([0, 9, 12])].set(50.0)
    ids_N = sample_ids(jax.random.key(0), logits_NV, allowed_ids(vocab, 16), Filters())
    assert set(np.asarray(ids_N)) == {3, 4, 5, 6, 7, 8}


def test_samples_follow_the_filtered_distribution():
    logits_V = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    logits_NV = jnp.broadcast_to(logits_V, (20_000, 4))
    ids_N = sample_ids(jax.random.key(3), logits_NV, ALL_V[:4], Filters(top_p=0.8))
    shares_V = np.bincount(np.asarray(ids_N), minlength=4) / 20_000
    np.testing.assert_allclose(shares_V, [0.625, 0.375, 0, 0], atol=0.015)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}])
def test_values_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Filters(**wrong)


ALLOWED_V = np.array([False, True, True, False, True, True, False, True])
EXTREMES = [0.0, 5e-324, 1e-45, 1e-38, 1e-37, 1e-3, 1.0, 1e3, 1e37, 1e38, 3e38, 1e300, 1.7e308]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("temperature", EXTREMES)
def test_forbidden_ids_never_come_out(temperature, dtype):
    """Whatever temperature and filters are, and however large the logits of what is forbidden."""
    rows = np.random.default_rng(1).normal(size=(40, 8)) * np.logspace(-4, 4, 40)[:, None]
    rows[::5, [0, 3, 6]], rows[1::5, [0, 6]], rows[2::5, 3] = 3e38, np.inf, np.nan
    with np.errstate(over="ignore"):
        logits_NV = jnp.asarray(rows, dtype)
    for top_k in (0, 1, 6, 2**40):
        for top_p in (1e-38, 1e-300, 0.5, 1 - 1e-12, 1.0):
            filters = Filters(temperature, top_k, top_p)
            ids_N = np.asarray(sample_ids(jax.random.key(0), logits_NV, ALLOWED_V, filters))
            assert ALLOWED_V[ids_N].all() and ids_N.min() >= 0, filters


@pytest.mark.parametrize("temperature", EXTREMES)
def test_the_distribution_is_the_softmax_in_float64(temperature):
    rows = np.random.default_rng(2).normal(size=(30, 8)) * np.logspace(-3, 30, 30)[:, None]
    logits_NV = np.asarray(rows, np.float32)
    found_NV = np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(logits_NV), ALL_V, Filters(temperature))))
    below_NV = logits_NV.astype(np.float64) - logits_NV.max(-1, keepdims=True)
    with np.errstate(over="ignore"):
        exact_NV = np.exp(below_NV / temperature) if temperature else (below_NV == 0).astype(float)
    np.testing.assert_allclose(found_NV, exact_NV / exact_NV.sum(-1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0, 1e30])
def test_what_is_infinitely_likely_comes_out(temperature):
    logits_NV = jnp.tile(jnp.asarray([0.0, 5.0, jnp.inf, -jnp.inf]), (200, 1))
    ids_N = sample_ids(jax.random.key(0), logits_NV, ALL_V[:4], Filters(temperature))
    assert set(np.asarray(ids_N)) == {2}


@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1.0, 1e38])
@pytest.mark.parametrize("row", [[1.0, np.nan, 2.0, 0.0], [np.nan] * 4, [-np.inf] * 4])
def test_logits_that_are_no_numbers_give_no_id(row, temperature):
    allowed_V = np.array([False, True, True, True] + [True] * 300)
    logits_NV = jnp.asarray([row + [-np.inf] * 300, [1.0, 2.0, 3.0, 4.0] + [0.0] * 300])
    for filters in (Filters(temperature), Filters(temperature, 2, 0.5)):
        ids_N = np.asarray(sample_ids(jax.random.key(0), logits_NV, allowed_V, filters))
        assert ids_N[0] == NO_ID and allowed_V[ids_N[1]]
    with pytest.raises(RunError, match="not numbers"):
        check_ids(ids_N)
    np.testing.assert_array_equal(check_ids(ids_N[1:]), ids_N[1:])
