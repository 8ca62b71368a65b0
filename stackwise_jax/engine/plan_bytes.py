"""What a training step holds beside its arguments: what a backward pass keeps, and formulas for the rest.

What the backward pass keeps is read from the traced program, exactly but for what the compiler merges or recomputes.
What is there for a moment only (a block's own gradients, logits, copies in the update) is estimated: the formulas are
those of `kernels/` and of the update of `engine/update.py`, held against the compiled step in tests.

Legend: B batch, T sequence, D d_model, V vocabulary (padded), L blocks, H heads.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from stackwise_jax.config.schema import OptimizerConfig
from stackwise_jax.engine.optimizer import CHUNK_8BIT
from stackwise_jax.kernels.attention.api import in_pieces
from stackwise_jax.kernels.attention.chunked import MAX_SCORES
from stackwise_jax.kernels.cross_entropy.chunked import default_chunk
from stackwise_jax.kernels.linear_attention.chunked import CHUNK
from stackwise_jax.model import Block, Rack, Stack, combine, dtype_of
from stackwise_jax.random_streams import root_key

Tree = Any

# Copies of what learns, in its dtype, that the update holds beside weights, state and gradient; read off compiled steps
# of which nothing else is large. adamw8bit holds more of the part of a leaf that it is at.
UPDATE_COPIES = {"adamw": 1.5, "lion": 1.3, "sgd": 1.3, "adafactor": 1.3, "muon": 1.9, "adamw8bit": 1.85}
PART_COPIES = 2.4
# Of attention's scores in float32 at a time: scores, probabilities, and their gradient if there is one.
SCORE_COPIES = {True: 3, False: 2}
FEATURE_COPIES = 2  # of random features in float32: phases, exponents or features, and their gradient
LOGIT_COPIES = 2.5  # of a chunk of logits in float32: logits, their gradient in float32 and in the compute dtype


def tree_bytes(tree: Tree) -> int:
    """Bytes of a tree of arrays or shapes on one device, by its shardings where it has some."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += int(np.prod(shape)) * leaf.dtype.itemsize
    return total


def width(dtype: str) -> int:
    """Bytes of a number."""
    return jnp.dtype(dtype_of(dtype)).itemsize


def kept_for_backward(stack: Stack, learning: Tree, frozen: Tree, x_BTD: Any, mode: str | None, dropout: bool) -> int:
    """Bytes that the backward pass of a stack keeps, besides its arguments; by tracing, nothing is computed.

    Args:
        learning, frozen: shapes of its tree in two; gradients are taken of the first and of the input.
        x_BTD: shape of the input of a microbatch on one device.
    """
    rows = jax.ShapeDtypeStruct(x_BTD.shape[:2], jnp.int32)

    def residuals(learning, frozen, x_BTD, positions_BT, segment_ids_BT, key):
        def run(learning, x_BTD):
            how = {"positions_BT": positions_BT, "segment_ids_BT": segment_ids_BT, "attention_mode": mode}
            tree = combine(learning, frozen)
            return stack.apply({"params": tree}, x_BTD, dropout_key=key if dropout else None, **how)

        return jax.tree.leaves(jax.vjp(run, learning, x_BTD)[1])

    key = jax.eval_shape(lambda: root_key(0))
    jaxpr = jax.make_jaxpr(residuals)(learning, frozen, x_BTD, rows, rows, key).jaxpr
    given = set(jaxpr.invars)
    made = {id(v): v.aval for v in jaxpr.outvars if not isinstance(v, Literal) and v not in given}
    return sum(tree_bytes(jax.ShapeDtypeStruct(a.shape, a.dtype)) for a in made.values() if hasattr(a, "shape"))


def block_moment(block: Block, rows: int, seq_len: int, learns: bool) -> int:
    """Bytes that the backward pass of one block makes for a moment: gradients of its activations, attention's scores.

    rows: sequences of a microbatch on one device.
    """
    itemsize = width(block.compute_dtype)
    heads, kv_heads = block.n_heads, block.kv_heads
    made = heads * (block.qk_dim + block.rotary_dim) + kv_heads * (block.qk_dim + block.v_dim)
    activations = rows * seq_len * (3 * block.d_ff + block.d_model + max(made, 3 * block.d_model)) * itemsize
    if block.kernel is not None:  # phases and features in float32
        activations += FEATURE_COPIES * rows * seq_len * (heads + kv_heads) * block.kernel.features * 4
    matrices = sum(n_in * n_out for n_in, n_out in block.matrices.values())
    casts = matrices * itemsize if block.compute_dtype != block.param_dtype or not learns else 0
    return activations + casts + score_bytes(block, rows, seq_len)


def score_bytes(block: Block, rows: int, seq_len: int, *, backward: bool = True) -> int:
    """Bytes of attention's scores while they exist, of one block."""
    held, way = seq_len * seq_len, block.attention_implementation
    if block.kernel is not None and block.kernel.mode == "linear":
        held = held if way == "reference" else min(seq_len, CHUNK) ** 2
    elif way == "chunked" or (way != "reference" and in_pieces(seq_len, seq_len) == "chunked"):
        held = min(held, max(seq_len, MAX_SCORES))
    return SCORE_COPIES[backward] * rows * block.n_heads * held * 4


def head_moment(rack: Rack, rows: int, predicted: int, *, learns: bool, shards: int, backward: bool = True) -> int:
    """Bytes of the head and its loss for a moment: a chunk of logits, gradients, the matrix in the compute dtype.

    Args:
        rows: sequences of a microbatch on one device; predicted: positions of each that go through the head.
        learns: its gradient is summed in float32.
        shards: devices that the batch is spread over.
    """
    D, V = rack.d_model, rack.vocab_size
    itemsize = width(rack.compute_dtype)
    chunk = default_chunk(rows * shards, predicted, D, V, shards)
    cast = D * V * itemsize if rack.compute_dtype != rack.param_dtype or not learns else 0
    logits = round(LOGIT_COPIES * rows * chunk * V * 4)
    hidden = rows * predicted * D * (itemsize * 2 + 4)
    gradient = D * V * 4 if learns and backward else 0
    return cast + logits + hidden + gradient


def update_moment(cfg: OptimizerConfig, learning_bytes: int, entries: int) -> int:
    """Bytes of the update's copies: what `UPDATE_COPIES` says, in float32 where it computes so."""
    wide = cfg.rounding == "stochastic" or cfg.name == "adamw8bit"
    part = PART_COPIES * 4 * min(entries, 4 * CHUNK_8BIT) if cfg.name == "adamw8bit" else 0
    return round(UPDATE_COPIES[cfg.name] * (4 * entries if wide else learning_bytes) + part)
