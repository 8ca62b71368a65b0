"""Attention weights on request: of every kind of attention they are the weights that training uses.

Legend: B batch, T sequence, H heads, e size of a value.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BLOCKS, D, H, block

from stackwise_jax.errors import UsageError
from stackwise_jax.evaluation import attention_weights
from stackwise_jax.model import Block, Rack, Stack, embed_tokens, run_stacks
from stackwise_jax.model.attention import attend, make_heads
from stackwise_jax.model.norm import rms_norm

T = 8
TOKENS = jax.random.randint(jax.random.key(2), (2, T), 0, 30)
KINDS = [f"{kind}, {way}, 2 to a group" for kind in ("mha", "mla") for way in ("products", "softmax", "linear")]


def rack_of(*stacks: tuple[Block, ...]) -> Rack:
    return Rack(tuple(Stack(blocks, i, parent=None) for i, blocks in enumerate(stacks)), 30, D, parent=None)


@pytest.mark.parametrize("name", KINDS)
def test_weighted_values_are_what_attention_gives(name):
    given = BLOCKS[name]
    rack, ids_BT = rack_of((given, given), (given, given)), np.repeat([[1, 2], [3, 0]], T // 2, axis=1)
    params = jax.jit(rack.init_params)(jax.random.key(0))
    how = {"segment_ids_BT": jnp.asarray(ids_BT), "attention_mode": "causal"}
    weights_BHTT = attention_weights(rack, params, TOKENS, stack=1, block=1, **how)
    assert weights_BHTT.shape == (2, H, T, T) and weights_BHTT.dtype == jnp.float32
    seen_BTT = np.tri(T, dtype=bool) & (ids_BT[:, :, None] == ids_BT[:, None]) & (ids_BT[:, None] != 0)
    np.testing.assert_allclose(weights_BHTT.sum(-1), np.broadcast_to(seen_BTT.any(-1)[:, None], (2, H, T)), atol=1e-5)
    assert np.all((np.asarray(weights_BHTT) > 0) == seen_BTT[:, None])

    @jax.jit
    def values_and_result(params):
        tree = jax.tree.map(lambda leaf: leaf[1], params["stacks"]["001"]["blocks"])
        below = Stack((given,), parent=None), jax.tree.map(lambda leaf: leaf[:1], params["stacks"]["001"])
        stacks, trees = zip((rack.stacks[0], params["stacks"]["000"]), below, strict=True)
        x_BTD = run_stacks(stacks, trees, embed_tokens(rack, params["embed"], TOKENS), **how)
        x_BTD = rms_norm(x_BTD, tree["attn_norm"], given.norm_eps)
        positions_BT = jnp.arange(T)[None]
        heads = make_heads(given, tree["attn"], x_BTD, positions_BT)
        result_BTHe = attend(given, tree["attn"], heads, positions_BT, how["segment_ids_BT"], True)
        return jnp.repeat(heads.v_BTKe, H // given.kv_heads, axis=2), result_BTHe

    v_BTHe, o_BTHe = values_and_result(params)
    np.testing.assert_allclose(jnp.einsum("BHTS,BSHe->BTHe", weights_BHTT, v_BTHe), o_BTHe, atol=1e-5)


def test_unlike_blocks_and_modes_of_their_own():
    both, past = (
        block(n_kv_heads=2, attention_mode="bidirectional"),
        block("mla", attention_mode="causal", compute_dtype="bf16"),
    )
    rack = rack_of((both, past))
    params = jax.jit(rack.init_params)(jax.random.key(0))
    weights = [np.asarray(attention_weights(rack, params, TOKENS, stack=0, block=i)) for i in range(2)]
    assert np.all(weights[0] > 0) and np.all((weights[1] > 0) == np.tri(T, dtype=bool))
    assert weights[1].dtype == np.float32
    swapped = attention_weights(rack, params, TOKENS, stack=0, attention_mode="causal")
    assert np.all((np.asarray(swapped) > 0) == np.tri(T, dtype=bool))


@pytest.mark.parametrize(("stack", "index"), [(1, 0), (0, 2), (-1, 0)])
def test_blocks_that_are_not_there_are_refused(stack, index):
    rack = rack_of((block(), block()))
    with pytest.raises(UsageError, match=rf"no block {index} in a stack {stack}; .* \[2\] blocks"):
        attention_weights(rack, {}, TOKENS, stack=stack, block=index)
