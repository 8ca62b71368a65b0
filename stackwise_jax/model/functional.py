"""The parts of a rack as plain functions: what the engine composes, and what Rack itself is made of.

`rack` is only read as a spec, so the functions can be jitted with it as a static argument.

Legend: B batch, T sequence, S new positions while decoding, D d_model, V vocabulary (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from stackwise_jax.model.norm import init_norm, rms_norm
from stackwise_jax.model.spec import Params, call, dtype_of, require
from stackwise_jax.model.stack import Stack
from stackwise_jax.model.time import check_time, embed_time, init_time
from stackwise_jax.random_streams import Stream, stream_key

if TYPE_CHECKING:
    from stackwise_jax.model.rack import Rack


def stack_name(index: int) -> str:
    """The name of a stack in the parameter tree of a rack."""
    return f"{index:03d}"


def init_embed(rack: Rack, key: jax.Array) -> Params:
    """{"embedding": (V, D)}, normal with standard deviation init_std * sqrt(D), or init_std when the head is tied.

    The larger one keeps the embedding above what the first blocks add to it, and learns clearly faster; as a head it
    would start with large logits. A rack with a time embedding has its parameters under "time" (time.init_time). All
    init functions take the run's root key.
    """
    std = rack.init_std * (1.0 if rack.tie_embeddings else rack.d_model**0.5)
    params = {"embedding": _normal(rack, stream_key(key, Stream.EMBED), (rack.vocab_size, rack.d_model), std)}
    return params if rack.time_embedding == "none" else params | {"time": init_time(rack)}


def init_head(rack: Rack, key: jax.Array) -> Params:
    """{"norm": {"scale": (D,)}, "kernel": (D, V)}, normal with standard deviation init_std; no kernel when tied."""
    norm = init_norm(rack.d_model, dtype_of(rack.param_dtype))
    if rack.tie_embeddings:
        return {"norm": norm}
    return {
        "norm": norm,
        "kernel": _normal(rack, stream_key(key, Stream.HEAD), (rack.d_model, rack.vocab_size), rack.init_std),
    }


def init_stack(rack: Rack, index: int, key: jax.Array) -> Params:
    """The parameters of stack `index`. Each block's depend on its place in the rack only, never on the grouping."""
    first_block = sum(len(stack.blocks) for stack in rack.stacks[:index])
    return init_stack_blocks(rack.stacks[index], first_block, key)


def init_stack_blocks(stack: Stack, first_block: int | jax.Array, key: jax.Array) -> Params:
    """The parameters of a stack whose first block is the rack's block `first_block`, which may be traced."""
    return stack.init_params(stream_key(key, Stream.BLOCKS), first_block)


def init_rack(rack: Rack, key: jax.Array) -> Params:
    """All parameters of the rack: what `rack.init(key, tokens)["params"]` holds."""
    stacks = {stack_name(i): init_stack(rack, i, key) for i in range(len(rack.stacks))}
    return {"embed": init_embed(rack, key), "stacks": stacks, "head": init_head(rack, key)}


def embed_tokens(
    rack: Rack, embed_params: Params, tokens_BT: jax.Array, hidden_B: jax.Array | None = None
) -> jax.Array:
    """Rows of the embedding, in the compute dtype: (B, T) -> (B, T, D).

    hidden_B: the share of each sequence's tokens that is hidden, 0 to 1. A rack with a time embedding adds its vector
    at every position (model/time.py); any other rack takes none.

    Raises:
        UsageError: hidden_B is missing, or given to a rack without time embedding, or not one number per sequence.
    """
    check_time(rack, hidden_B, tokens_BT.shape[0])
    x_BTD = embed_params["embedding"][tokens_BT].astype(dtype_of(rack.compute_dtype))
    if hidden_B is None:
        return x_BTD
    return x_BTD + embed_time(rack, embed_params["time"], hidden_B)[:, None]


def run_stacks(
    stacks: Sequence[Stack],
    params_list: Sequence[Params],
    x_BTD: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    attention_mode: str | None = None,
    dropout_key: jax.Array | None = None,
    first_block: int | jax.Array = 0,
) -> jax.Array:
    """(B, T, D) -> (B, T, D) through the stacks in turn. Block i of them all drops as first_block + i (see Stack)."""
    for stack, params in zip(stacks, params_list, strict=True):
        x_BTD = call(stack, params, x_BTD, positions_BT, segment_ids_BT, attention_mode, dropout_key, first_block)
        first_block = first_block + len(stack.blocks)
    return x_BTD


def final_hidden(rack: Rack, head_params: Params, x_BTD: jax.Array) -> jax.Array:
    """The final norm."""
    return rms_norm(x_BTD, head_params["norm"], rack.norm_eps)


def head_kernel(rack: Rack, head_params: Params, embed_params: Params | None) -> jax.Array:
    """The (D, V) matrix from hidden states to logits: the head's own, or the embedding's transpose when tied."""
    if not rack.tie_embeddings:
        return head_params["kernel"]
    assert embed_params is not None, "a tied head needs the embedding"
    return embed_params["embedding"].T


def logits(rack: Rack, head_params: Params, embed_params: Params | None, x_BTD: jax.Array) -> jax.Array:
    """Final norm and head: (B, T, D) -> (B, T, V) float32, the product accumulated in float32."""
    hidden_BTD, kernel_DV = final_hidden(rack, head_params, x_BTD), head_kernel(rack, head_params, embed_params)
    dtype = dtype_of(rack.compute_dtype)
    return jnp.matmul(hidden_BTD.astype(dtype), kernel_DV.astype(dtype), preferred_element_type=jnp.float32)


def path(rack: Rack, depth: int | None) -> tuple[Stack, ...]:
    """The first `depth` stacks (None: all).

    Raises:
        UsageError: the rack has not so many.
    """
    n_stacks = len(rack.stacks)
    require(
        depth is None or 1 <= depth <= n_stacks, f"depth is {depth}; write 1 to {n_stacks} (the stacks of the rack)"
    )
    return tuple(rack.stacks[:depth])


def init_cache(rack: Rack, batch: int, max_len: int, dtype: Any = None, depth: int | None = None) -> list[Any]:
    """An empty cache per stack for `decode`; dtype None: the compute dtype."""
    dtype = dtype_of(rack.compute_dtype) if dtype is None else dtype
    return [stack.init_cache(batch, max_len, dtype) for stack in path(rack, depth)]


def decode(
    rack: Rack,
    params: Params,
    tokens_BS: jax.Array,
    positions_BS: jax.Array,
    caches: list[Any],
    depth: int | None = None,
    valid_BS: jax.Array | None = None,
) -> tuple[jax.Array, list[Any]]:
    """Logits (B, S, V) float32 of S new tokens at these indices of the cache, and the caches that hold them too.

    Tokens come in the order of their positions, each once. valid_BS is False where one does not count: padding behind
    a prompt, or a token that will be decoded again. Its logits mean nothing, and what it leaves in a cache is written
    over when its position is decoded (a state of linear attention, which nothing can be taken out of, leaves it out).
    None: all count.

    A time embedding is told that nothing is hidden: what is decoded is the text itself.
    """
    hidden_B = None if rack.time_embedding == "none" else jnp.zeros(tokens_BS.shape[0], jnp.float32)
    x_BSD, new_caches = embed_tokens(rack, params["embed"], tokens_BS, hidden_B), []
    for i, stack in enumerate(path(rack, depth)):
        given = x_BSD, positions_BS, caches[i], valid_BS
        x_BSD, cache = call(stack, params["stacks"][stack_name(i)], *given, method="decode")
        new_caches.append(cache)
    return logits(rack, params["head"], params["embed"], x_BSD), new_caches


def _normal(rack: Rack, key: jax.Array, shape: tuple[int, int], std: float) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype_of(rack.param_dtype))
