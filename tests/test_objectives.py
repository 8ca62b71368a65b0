"""Corruption: shares, weights, the exactness of the bound, and independence of everything but key and example.

Legend: B batch (sequences), T sequence length (tokens).
"""

import dataclasses
import itertools
import math
from functools import partial

import jax
import numpy as np
import pytest

from stackwise_jax.curriculum.phase import Noise, Objective
from stackwise_jax.errors import UsageError
from stackwise_jax.objectives import Examples, Vocab, example_keys, make_batch, max_targets
from stackwise_jax.objectives.corruption import hidden_count, hidden_weight
from stackwise_jax.objectives.schedules import SCHEDULES

VOCAB = Vocab(size=40, mask_id=3, pad_id=0, special_ids=(0, 1, 2, 3), eos_id=2)
CLM, MLM, DIFFUSION = (Objective(kind=kind) for kind in ("clm", "mlm", "diffusion"))
FIXED = Noise(kind="fixed", low=0.15, high=0.15)
RANGE = Noise(kind="range", low=0.15, high=0.9)
ELBO = Noise(kind="elbo")
PART = Noise(kind="elbo", low=0.25, high=0.5, schedule="cosine")
HIDING = [(MLM, FIXED), (DIFFUSION, RANGE), (DIFFUSION, ELBO)]


def examples_of(lengths, seq_len=32, seed=0) -> Examples:
    """Rows of one document each, of the given lengths, padded; lists of lengths are packed documents."""
    rng = np.random.default_rng(seed)
    tokens_BT = np.full((len(lengths), seq_len), VOCAB.pad_id, np.int32)
    segment_ids_BT, positions_BT = np.zeros_like(tokens_BT), np.zeros_like(tokens_BT)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents if isinstance(documents, list) else [documents], 1):
            span = slice(start, start + length)
            tokens_BT[row, span] = rng.choice(VOCAB.ordinary_ids, length)
            segment_ids_BT[row, span], positions_BT[row, span] = number, np.arange(length)
            start += length
    return Examples(tokens_BT, segment_ids_BT, positions_BT, np.arange(100, 100 + len(lengths), dtype=np.int32))


@partial(jax.jit, static_argnums=(0, 1, 5))
def jitted_batch(objective, noise, examples, seed_key, visit, vocab):
    return make_batch(objective, noise, examples, example_keys(seed_key, examples.example_ids_B, visit), vocab)


def batch_of(objective, noise, examples, seed=0, visit=0, vocab=VOCAB):
    return jax.tree.map(np.asarray, jitted_batch(objective, noise, examples, jax.random.key(seed), visit, vocab))


def mass(schedule, n, total) -> np.ndarray:
    """P(n of total tokens are hidden) over the whole of a schedule."""
    n = np.float32(n)
    return np.asarray(SCHEDULES[schedule].mass(n - 1, n, np.float32(total)))


def assert_same(a, b):
    for name, x, y in zip(a._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


def test_clm_predicts_the_next_token_of_the_same_document():
    examples = examples_of([[5, 3], 8, 0], seq_len=8)
    examples.segment_ids_BT[0, 7:] = 0
    batch = batch_of(CLM, Noise(), examples)
    np.testing.assert_array_equal(batch.inputs_BT, examples.tokens_BT)
    np.testing.assert_array_equal(batch.targets_BT[:, :-1], examples.tokens_BT[:, 1:])
    np.testing.assert_array_equal(batch.weights_BT, [[1, 1, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0], [0] * 8])
    np.testing.assert_array_equal(batch.counts_BT, batch.weights_BT)


@pytest.mark.parametrize(("objective", "noise"), [(CLM, Noise()), *HIDING])
def test_dtypes_and_what_is_passed_on(objective, noise):
    examples = examples_of([32, [10, 12], 7])
    batch = batch_of(objective, noise, examples)
    assert [x.dtype for x in batch] == [np.int32, np.int32, np.float32, np.float32, np.int32, np.int32, np.float32]
    np.testing.assert_array_equal(batch.positions_BT, examples.positions_BT)
    np.testing.assert_array_equal(batch.segment_ids_BT, examples.segment_ids_BT)


@pytest.mark.parametrize(("objective", "noise"), HIDING)
def test_padding_is_never_chosen_and_every_row_has_a_target(objective, noise):
    lengths = [1, 2, 3, 31, 32, [4, 9], [1, 1, 1], 0] * 8
    examples = examples_of(lengths)
    for visit in range(5):
        batch = batch_of(objective, noise, examples, visit=visit)
        chosen = batch.weights_BT > 0
        real = examples.segment_ids_BT != 0
        assert not (chosen & ~real).any()
        assert (chosen.sum(1)[real.any(1)] >= 1).all() and not chosen[~real.any(1)].any()
        assert (chosen.sum(1) <= [max_targets(objective, noise, 32)] * len(lengths)).all()
        np.testing.assert_array_equal(batch.inputs_BT[~chosen], examples.tokens_BT[~chosen])
        np.testing.assert_array_equal(batch.targets_BT, examples.tokens_BT)
        np.testing.assert_array_equal(batch.counts_BT, real if noise.kind == "elbo" else batch.weights_BT)
        assert np.isfinite(batch.weights_BT).all()


def test_diffusion_hides_all_that_it_predicts():
    for noise in (RANGE, ELBO):
        batch = batch_of(DIFFUSION, noise, examples_of([32, 20, 5]))
        np.testing.assert_array_equal(batch.inputs_BT == VOCAB.mask_id, batch.weights_BT > 0)


def test_mlm_chooses_the_stated_share_and_replaces_80_10_10():
    examples = examples_of([32] * 256, seq_len=32)
    masked = random = kept = 0
    replaced_by = set()
    for visit in range(8):
        batch = batch_of(MLM, FIXED, examples, visit=visit)
        chosen = batch.weights_BT == 1
        np.testing.assert_array_equal(chosen.sum(1), round(0.15 * 32))
        shown, target = batch.inputs_BT[chosen], batch.targets_BT[chosen]
        masked += (shown == VOCAB.mask_id).sum()
        kept += (shown == target).sum()
        other = (shown != VOCAB.mask_id) & (shown != target)
        random += other.sum()
        replaced_by |= set(shown[other].tolist())
    total = masked + random + kept
    same = 0.1 / len(VOCAB.ordinary_ids)  # a random token may be the original one
    for count, share in ((masked, 0.8), (random, 0.1 - same), (kept, 0.1 + same)):
        assert abs(count / total - share) < 4 * math.sqrt(share * (1 - share) / total)
    assert replaced_by == set(VOCAB.ordinary_ids.tolist())


def test_random_replacement_skips_special_ids_wherever_they_are():
    vocab = Vocab(size=9, mask_id=8, pad_id=5, eos_id=0, special_ids=(0, 2, 5, 8), unk_id=7)
    examples = examples_of([32] * 256)
    examples = examples._replace(tokens_BT=np.full_like(examples.tokens_BT, 1))
    shown = batch_of(MLM, Noise(kind="fixed", low=0.9, high=0.9), examples, vocab=vocab).inputs_BT
    assert set(np.unique(shown).tolist()) == {1, 3, 4, 6, 8}


def documents_of(vocab, bos_id, lengths, seq_len) -> Examples:
    """Rows of packed documents, bos and eos around ordinary tokens; a row without lengths is padding."""
    examples = examples_of([[n + 2 for n in row] for row in lengths], seq_len)
    for row, documents in enumerate(lengths):
        start = 0
        for n in documents:
            examples.tokens_BT[row, [start, start + n + 1]] = bos_id, vocab.eos_id
            start += n + 2
    examples.tokens_BT[examples.segment_ids_BT == 0] = vocab.pad_id
    return examples


# A tokenizer as others make them: special ids on both sides and in the middle.
SCATTERED = Vocab(size=40, mask_id=39, pad_id=20, eos_id=38, special_ids=(0, 1, 20, 21, 38, 39))


@pytest.mark.parametrize(("vocab", "bos_id"), [(VOCAB, 1), (SCATTERED, 21)])
@pytest.mark.parametrize("packed_as_one", [False, True], ids=["pack", "chunk"])
@pytest.mark.parametrize(("objective", "noise"), [(CLM, Noise()), *HIDING, (DIFFUSION, PART)])
def test_the_end_of_a_document_is_a_target_and_no_other_special_token_is(
    objective, noise, packed_as_one, vocab, bos_id
):
    examples = documents_of(vocab, bos_id, [[4, 7, 1], [20], [1, 1, 1, 1], []], seq_len=24)
    if packed_as_one:
        examples = examples._replace(segment_ids_BT=np.minimum(examples.segment_ids_BT, 1))
    batches = [batch_of(objective, noise, examples, visit=visit, vocab=vocab) for visit in range(60)]
    ended = np.zeros_like(examples.tokens_BT)
    for batch in batches:
        targets = batch.targets_BT[batch.weights_BT > 0]
        assert not set(targets.tolist()) & {0, 1, vocab.mask_id, vocab.pad_id, bos_id} - {vocab.eos_id}
        assert not (batch.counts_BT[~vocab.is_target[batch.targets_BT]]).any()
        starts = examples.tokens_BT == bos_id
        assert (batch.inputs_BT[starts] == bos_id).all()
        ended += (batch.targets_BT == vocab.eos_id) & (batch.weights_BT > 0)
    assert np.count_nonzero(ended) == 8  # the end of each of the eight documents, where it is often enough looked at


@pytest.mark.parametrize(("objective", "noise"), HIDING)
def test_shares_are_those_of_the_tokens_that_can_be_hidden(objective, noise):
    examples = documents_of(VOCAB, 1, [[1, 1, 1, 1, 1, 1], [18]], seq_len=20)
    batch = batch_of(objective, noise, examples)
    chosen = (batch.weights_BT > 0).sum(1)
    np.testing.assert_allclose(batch.hidden_B, chosen / [12, 19], rtol=1e-6)
    if noise.kind == "elbo":
        np.testing.assert_array_equal(batch.counts_BT.sum(1), [12, 19])


def test_vocab_refuses_what_cannot_be_drawn_from():
    with pytest.raises(UsageError, match="mask id 9"):
        Vocab(size=9, mask_id=9, pad_id=0, eos_id=2, special_ids=())
    with pytest.raises(UsageError, match="all special"):
        Vocab(size=4, mask_id=3, pad_id=0, eos_id=2, special_ids=(1,))
    with pytest.raises(UsageError, match="special id 12"):
        Vocab(size=9, mask_id=3, pad_id=0, eos_id=2, special_ids=(12,))


def test_every_position_is_chosen_equally_often():
    examples = examples_of([[5, 3]] * 512, seq_len=10)
    counts = np.zeros(10)
    for visit in range(8):
        counts += (batch_of(DIFFUSION, Noise(kind="fixed", low=0.25, high=0.25), examples, visit=visit).weights_BT).sum(
            0
        )
    draws = 8 * 512
    assert counts[8:].sum() == 0
    assert np.abs(counts[:8] / draws - 0.25).max() < 4.5 * math.sqrt(0.25 * 0.75 / draws)


@pytest.mark.parametrize(("objective", "noise"), [*HIDING, (DIFFUSION, PART)])
def test_an_example_does_not_depend_on_its_batch(objective, noise):
    examples = examples_of([32, 20, [9, 9], 3, 32, 17])
    whole = batch_of(objective, noise, examples, seed=7)
    order = np.array([4, 0, 2])
    part = batch_of(objective, noise, Examples(*(x[order] for x in examples)), seed=7)
    assert_same(part, type(whole)(*(x[order] for x in whole)))


@pytest.mark.parametrize(("objective", "noise"), [(CLM, Noise()), *HIDING])
def test_jit_equals_no_jit_and_a_key_is_reproducible(objective, noise):
    examples = examples_of([32, 20, [9, 9], 3])
    jitted = batch_of(objective, noise, examples, seed=1)
    with jax.disable_jit():
        keys_B = example_keys(jax.random.key(1), examples.example_ids_B, 0)
        assert_same(jitted, jax.tree.map(np.asarray, make_batch(objective, noise, examples, keys_B, VOCAB)))
    assert_same(jitted, batch_of(objective, noise, examples, seed=1))


@pytest.mark.parametrize("change", ["seed", "visit", "example"])
def test_seed_visit_and_example_change_the_corruption(change):
    examples = examples_of([32] * 8)
    before = batch_of(MLM, FIXED, examples)
    if change == "example":
        examples = examples._replace(example_ids_B=examples.example_ids_B + 1)
    after = batch_of(MLM, FIXED, examples, seed=int(change == "seed"), visit=int(change == "visit"))
    assert (before.weights_BT != after.weights_BT).any(1).all()


def test_more_noise_hides_a_superset():
    examples = examples_of([32, 32, [9, 4], 5] * 2)
    shares = (0.2, 0.6, 1.0)
    batches = [batch_of(DIFFUSION, Noise(kind="fixed", low=s, high=s), examples) for s in shares]
    for low, high in itertools.pairwise(batches):
        assert (low.weights_BT <= high.weights_BT).all() and high.weights_BT.sum() > low.weights_BT.sum()
    np.testing.assert_array_equal(batches[-1].weights_BT, examples.segment_ids_BT != 0)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_diffusion_at_a_share_masks_all_that_it_chooses(share):
    examples = examples_of([32, 20, [8, 4], 8])
    batch = batch_of(DIFFUSION, Noise(kind="fixed", low=share, high=share), examples)
    chosen = batch.weights_BT > 0
    np.testing.assert_array_equal(chosen.sum(1), share * np.array([32, 20, 12, 8]))
    np.testing.assert_array_equal(batch.weights_BT, chosen)
    np.testing.assert_array_equal(batch.counts_BT, chosen)
    np.testing.assert_array_equal(batch.inputs_BT == VOCAB.mask_id, chosen)


@pytest.mark.parametrize(("objective", "noise"), [(CLM, Noise()), *HIDING, (DIFFUSION, PART)])
def test_the_hidden_share_is_that_of_the_real_tokens(objective, noise):
    examples = examples_of([32, 20, [9, 4], 1, 0])
    batch = batch_of(objective, noise, examples)
    n_hidden = np.zeros(5) if objective is CLM else (batch.weights_BT > 0).sum(1)
    np.testing.assert_allclose(batch.hidden_B, n_hidden / [32, 20, 13, 1, 1], rtol=1e-6)
    assert objective is CLM or (batch.hidden_B[:3] > 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_a_map_onto_0_1_and_its_masses_are_exact(name):
    schedule = SCHEDULES[name]
    u = np.linspace(0, 1, 1001, dtype=np.float32)
    share = np.asarray(schedule.share(u))
    assert abs(share[0]) < 1e-7 and abs(share[-1] - 1) < 1e-6 and (np.diff(share) > 0).all()
    expected = {
        "linear": lambda u: u,
        "cosine": lambda u: 1 - np.cos(np.pi * u / 2),
        "exponential": lambda u: (np.exp(3 * u) - 1) / (np.exp(3) - 1),
    }[name](u.astype(np.float64))
    np.testing.assert_allclose(share, expected, atol=1e-6)
    inverse = {
        "linear": lambda x: x,
        "cosine": lambda x: 2 / np.pi * np.arccos(1 - x),
        "exponential": lambda x: np.log1p(x * np.expm1(3)) / 3,
    }[name]
    for total in (1, 2, 7, 4096):
        last = np.arange(1, total + 1)
        for first in (last - 1, last // 2, 0 * last):
            mass = schedule.mass(np.float32(first), np.float32(last), np.float32(total))
            np.testing.assert_allclose(mass, inverse(last / total) - inverse(first / total), rtol=2e-6)
        assert not np.asarray(schedule.mass(np.float32(last - 1), np.float32(last - 1), np.float32(total))).any()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", ["range", "elbo"])
def test_counts_follow_the_schedule(name, kind):
    noise = Noise(kind=kind, low=0.2 if kind == "range" else 0.0, high=0.8 if kind == "range" else 1.0, schedule=name)
    u = (np.arange(200_000, dtype=np.float32) + 0.5) / 200_000
    n = np.asarray(hidden_count(noise, u, np.int32(10)))
    if kind == "range":
        share = 0.2 + 0.6 * np.asarray(SCHEDULES[name].share(u), np.float64)
        assert n.min() == 2 and n.max() == 8
        assert np.abs(n / 10 - share).max() <= 0.05 + 1e-6
    else:
        drawn = np.bincount(n, minlength=11)[1:] / len(u)
        np.testing.assert_allclose(drawn, mass(name, np.arange(1, 11), 10), atol=2e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_elbo_is_the_mean_over_all_orders(name):
    """Every mask of a sequence of 5, under an arbitrary model: nll of position i is any number given what is hidden."""
    size, noise = 5, Noise(kind="elbo", schedule=name)
    rng = np.random.default_rng(3)
    nll = {
        (i, hidden): rng.exponential()
        for n in range(1, size + 1)
        for hidden in itertools.combinations(range(size), n)
        for i in hidden
    }
    per_order = [
        sum(nll[i, tuple(sorted(order[step:]))] for step, i in enumerate(order))
        for order in itertools.permutations(range(size))
    ]
    u = (np.arange(400_000, dtype=np.float32) + 0.5) / 400_000
    counts = np.asarray(hidden_count(noise, u, np.int32(size)))
    exact = sampled = 0.0
    for n in range(1, size + 1):
        masks = list(itertools.combinations(range(size), n))
        weight = float(hidden_weight(noise, np.int32(n), np.int32(size)))
        mean_over_masks = np.mean([sum(weight * nll[i, hidden] for i in hidden) for hidden in masks])
        exact += float(mass(name, n, size)) * mean_over_masks
        sampled += (counts == n).mean() * mean_over_masks
    np.testing.assert_allclose(exact, np.mean(per_order), rtol=2e-6)
    np.testing.assert_allclose(sampled, np.mean(per_order), rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_elbo_weights_of_a_real_batch_average_to_one_per_token(name):
    """With nll = 1 everywhere the bound is n_real nats: the mean of sum(weights) / sum(counts) is 1."""
    examples = examples_of([32, 20, [9, 4], 5] * 256)
    batch = [batch_of(DIFFUSION, Noise(kind="elbo", schedule=name), examples, visit=visit) for visit in range(4)]
    per_row = np.concatenate([b.weights_BT.sum(1) / b.counts_BT.sum(1) for b in batch])
    assert abs(per_row.mean() - 1) < 4 * max(per_row.std(), 1e-6) / math.sqrt(len(per_row))
    for b in batch:
        n, n_real = (b.weights_BT > 0).sum(1, dtype=np.float32), b.counts_BT.sum(1)
        expected = 1 / (n * mass(name, n, n_real))
        np.testing.assert_allclose(b.weights_BT.max(1), expected, rtol=1e-5)
        if name == "linear":
            np.testing.assert_allclose(b.weights_BT.max(1), n_real / n, rtol=1e-6)


def test_max_targets_is_a_tight_bound():
    assert max_targets(CLM, Noise(), 64) == 64
    assert max_targets(DIFFUSION, ELBO, 64) == 64
    assert max_targets(DIFFUSION, PART, 64) == 32
    assert max_targets(DIFFUSION, RANGE, 64) == math.ceil(0.9 * 64)
    assert max_targets(MLM, FIXED, 3) == 1
    lengths = np.arange(1, 1001, dtype=np.int32)
    n = np.asarray(hidden_count(FIXED, np.zeros(1000, np.float32), lengths))
    most = np.maximum.accumulate(n)
    bound = np.array([max_targets(MLM, FIXED, int(length)) for length in lengths])
    assert (most <= bound).all() and (bound <= most + 1).all()


def test_objective_and_noise_are_static_arguments():
    hash((MLM, dataclasses.replace(RANGE), VOCAB))
