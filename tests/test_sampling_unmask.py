"""Orders on probabilities written by hand, blocks from left to right, and the time that a rack is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.model import create_simple_rack, embed_tokens, logits, run_stacks
from stackwise_jax.objectives.batch import Vocab
from stackwise_jax.sampling import ORDERS, block_counts, generate_unmask, unmask, unmask_counts
from stackwise_jax.sampling.filters import Filters, allowed_ids
from stackwise_jax.sampling.prompt import masked_row
from stackwise_jax.sampling.settle import settle, sureness
from stackwise_jax.sampling.unmask import fill

VOCAB = Vocab(size=8, mask_id=3, pad_id=0, special_ids=(0, 1, 2, 3), eos_id=2)
ALLOWED_V = allowed_ids(VOCAB, 8)
OPEN_T = np.array([True, True, True, False])
# Of the ids 4..7 at four positions; the last is not masked, and surer than all others.
PROBS_T4 = np.array(
    [[0.50, 0.48, 0.01, 0.01], [0.16, 0.52, 0.16, 0.16], [0.02, 0.40, 0.55, 0.03], [0.97, 0.01, 0.01, 0.01]]
)
# Logits of special tokens, which can never come out, must not count.
LOGITS_TV = jnp.asarray(np.concatenate([np.full((4, 4), 9.0), np.log(PROBS_T4)], axis=1), jnp.float32)


@pytest.mark.parametrize(
    ("order", "sequence"),
    [
        ("confidence", [2, 1, 0]),  # 0.55, 0.52, 0.50
        ("entropy", [0, 2, 1]),  # 0.79, 0.88, 1.22 nats
        ("margin", [1, 2, 0]),  # 0.36, 0.15, 0.02
    ],
)
def test_each_order_settles_what_it_is_surest_of(order, sequence):
    for count in range(5):
        how = (ALLOWED_V, Filters(temperature=0.0), order)
        tokens_T, settled_T = settle(LOGITS_TV, jnp.full(4, 3), OPEN_T, count, jax.random.key(0), *how)
        assert set(np.flatnonzero(settled_T)) == set(sequence[:count])
        np.testing.assert_array_equal(tokens_T, np.where(settled_T, [4, 5, 6, 4], 3))


def test_sureness_is_what_its_definition_says():
    drawn_T = jnp.array([5, 4, 5, 7])
    found = {order: sureness(LOGITS_TV, drawn_T, jax.random.key(0), ALLOWED_V, order) for order in ORDERS}
    np.testing.assert_allclose(jnp.exp(found["confidence"]), [0.48, 0.16, 0.40, 0.01], rtol=1e-5)  # of the drawn token
    np.testing.assert_allclose(found["entropy"], (PROBS_T4 * np.log(PROBS_T4)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(found["margin"], [0.02, 0.36, 0.15, 0.96], atol=1e-6)
    assert ((found["random"] >= 0) & (found["random"] < 1)).all()


def test_random_order_settles_each_position_equally_often():
    def chosen(key):
        return settle(LOGITS_TV, jnp.full(4, 3), OPEN_T, 1, key, ALLOWED_V, Filters(temperature=0.0), "random")[1]

    often_T = jax.vmap(chosen)(jax.random.split(jax.random.key(0), 3000)).mean(0)
    np.testing.assert_allclose(often_T, [1 / 3, 1 / 3, 1 / 3, 0], atol=0.03)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1e38])
@pytest.mark.parametrize("top_p", [1e-38, 1.0])
def test_what_is_open_is_settled_however_extreme_the_logits_are(order, temperature, top_p):
    rows = LOGITS_TV.at[0, 5].set(-jnp.inf).at[1, 4:].multiply(1e30).at[2, 6].set(jnp.inf)
    how = jax.random.key(0), ALLOWED_V, Filters(temperature, top_p=top_p), order
    for logits_TV in (rows, rows.astype(jnp.bfloat16)):
        tokens_T, settled_T = settle(logits_TV, jnp.full(4, 3), OPEN_T, 3, *how)
        np.testing.assert_array_equal(settled_T, OPEN_T)
        assert ALLOWED_V[tokens_T[:3]].all() and tokens_T[3] == 3
        assert not jnp.isnan(sureness(logits_TV, tokens_T, jax.random.key(0), ALLOWED_V, order)).any()


@pytest.mark.parametrize("length", [0, 1, 7, 12, 65])
@pytest.mark.parametrize("block_size", [1, 3, 4, 100])
@pytest.mark.parametrize("spare", [0, 9, 500])
def test_blocks_are_finished_from_left_to_right(length, block_size, spare):
    steps = max(1, -(-length // block_size)) + spare
    counts_S, ends_S = block_counts(length, steps, block_size)
    assert len(counts_S) == len(ends_S) == min(length, steps)
    assert (counts_S >= 1).all()
    done = 0
    for end in sorted({*ends_S}):
        assert end - done == min(block_size, length - done)
        done += counts_S[ends_S == end].sum()
        assert done == end  # a block is complete before the passes of the next begin
    assert (np.diff(ends_S) >= 0).all()
    assert done == length


def test_steps_are_spread_over_the_blocks_by_their_tokens():
    counts_S, ends_S = block_counts(10, 5, 4)
    np.testing.assert_array_equal(ends_S, [4, 4, 8, 8, 10])
    np.testing.assert_array_equal(counts_S, [*unmask_counts(4, 2), *unmask_counts(4, 2), 2])


def build(seed=0, **fields):
    """A rack of two stacks whose logits depend on all that it reads, and its parameters."""
    rack = create_simple_rack(
        n_stacks=2, blocks_per_stack=1, d_model=16, d_ff=16, n_heads=2, vocab_size=40, attention_mode="bidirectional"
    ).clone(parent=None, **fields)
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(rack.init_params, jax.random.key(0))
    return rack, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.7).astype(leaf.dtype), shapes)


WIDE = Vocab(size=40, mask_id=3, pad_id=0, special_ids=(0, 1, 2, 3), eos_id=2)
PROMPT_P = np.array([1, 5, 3, 9], np.int32)  # holds a mask token of its own


@pytest.mark.parametrize("order", ORDERS)
def test_no_pass_settles_a_later_block_before_an_earlier_one(order):
    rack, params = build()
    row = masked_row(PROMPT_P, 11, WIDE)
    counts_S, ends_S = block_counts(11, 7, 4)
    keys_S = jax.random.split(jax.random.key(0), 7)
    how = {"filters": Filters(), "order": order, "attention_mode": None}
    for passes in range(8):
        counts = np.where(np.arange(7) < passes, counts_S, 0)  # the passes left out settle nothing
        arrays = (row.tokens_T, row.masked_T, row.segment_ids_1T, row.n_hideable, counts, 4 + ends_S, keys_S)
        arrays += (allowed_ids(WIDE, 40),)
        tokens_T, masked_T = fill(rack, params, *arrays, **how)
        left_B = [int(masked_T[start:end].sum()) for start, end in ((4, 8), (8, 12), (12, 15))]
        assert sum(left_B) == 11 - counts_S[:passes].sum()
        for earlier, later, size in zip(left_B, left_B[1:], (4, 3), strict=False):
            assert earlier == 0 or later == size
        np.testing.assert_array_equal(tokens_T[:4], PROMPT_P)
        np.testing.assert_array_equal(tokens_T[4:15] == 3, masked_T[4:15])


def test_prompts_lengths_and_blocks_in_rows_of_one_padded_length_share_one_compilation(monkeypatch):
    traces, settle = [], unmask.settle
    monkeypatch.setattr(unmask, "settle", lambda *args: (traces.append(1), settle(*args))[1])
    rack, params = build(1)
    for n_prompt, length, block in ((3, 20, None), (40, 20, 4), (9, 50, 10)):
        how = {"steps": 20, "block_size": block, "key": jax.random.key(0), "vocab": WIDE, "order": "margin"}
        assert len(generate_unmask(rack, params, np.full(n_prompt, 7), length=length, **how)) == n_prompt + length
    assert len(traces) == 1


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_a_rack_with_a_time_embedding_is_told_the_share_that_is_masked(kind):
    rack, params = build(time_embedding=kind)
    row_T = np.concatenate([PROMPT_P, np.full(6, 3)]).astype(np.int32)
    for left in (6, 4, 2):
        x_1TD = embed_tokens(rack, params["embed"], row_T[None], jnp.array([left / 8], jnp.float32))
        x_1TD = run_stacks(rack.stacks, list(params["stacks"].values()), x_1TD)
        logits_TV = np.array(logits(rack, params["head"], params["embed"], x_1TD)[0, :, 4:])
        odds_TV = np.exp(logits_TV - logits_TV.max(-1, keepdims=True))
        best_T = (odds_TV / odds_TV.sum(-1, keepdims=True)).max(-1)
        best_T[:4] = -1
        best_T[row_T != 3] = -1
        chosen = np.argsort(-best_T)[:2]
        row_T[chosen] = 4 + logits_TV[chosen].argmax(-1)
    ids = two_at_a_time(rack, params)
    np.testing.assert_array_equal(ids, row_T)


def two_at_a_time(rack, params):
    row = masked_row(PROMPT_P, 6, WIDE)
    assert row.n_hideable == 8  # the block and two tokens of the prompt: BOS is never hidden, a mask is no text
    arrays = (row.tokens_T, row.masked_T, row.segment_ids_1T, row.n_hideable, np.full(3, 2), np.full(3, 10))
    how = {"filters": Filters(temperature=0.0), "order": "confidence", "attention_mode": None}
    keys_S = jax.random.split(jax.random.key(0), 3)
    return np.asarray(fill(rack, params, *arrays, keys_S, allowed_ids(WIDE, 40), **how)[0])[:10]
