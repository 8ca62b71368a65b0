"""The bodies of flash attention: what one program of a grid computes for one tile of rows (Dao 2023, FlashAttention-2).

A query head and a key head come in parts whose scores add up: head and shared part, or cosines and sines. Scores are
kept times log2(e), because 2^x is what the hardware has. All sizes but T and S are powers of two, of at least 16.

Legend: T query rows, S key/value rows, G query heads of a key/value head, d and e sizes of a part of a query-key head
and of a value head, F frequencies, t query rows and s key rows of a tile. The name of a reference says what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LOG2_E = math.log2(math.e)
NT, NN = ((1,), (1,)), ((1,), (0,))  # which axes a product contracts: a b^T, a b


@dataclass(frozen=True)
class How:
    """What is known when a kernel is compiled.

    Attributes:
        causal: a row sees those up to its own index.
        scale: of the scores.
        n_keys: rows of keys that are no padding.
        t, s: query and key rows of a tile.
    """

    causal: bool
    scale: float
    n_keys: int
    t: int
    s: int


def forward(queries, keys, v_Se, q_ids_t, k_ids_S, feature_map, o_te, lse_t, *, how: How) -> None:
    """o and the log2 of the sum of 2^scores (+inf where nothing is seen) of one tile of queries and one head."""
    tile, t, s = pl.program_id(0), how.t, how.s
    parts = [q_td[...] for q_td in queries] if feature_map is None else _features(*queries, *feature_map)

    def step(j, carry, masked):
        most_t, sum_t, sum_te = carry
        rows = pl.ds(j * s, s)
        scores_ts = _scores(parts, [k_Sd[rows, :] for k_Sd in keys], how)
        if masked:
            scores_ts = _hide(scores_ts, _rows(tile, t, q_ids_t, ..., 0), _rows(j, s, k_ids_S, rows, 1), how)
        more_t = jnp.maximum(most_t, scores_ts.max(axis=1))
        base_t = jnp.where(more_t == -jnp.inf, 0.0, more_t)  # nothing was seen yet: -inf - -inf is no number
        p_ts, shrink_t = jnp.exp2(scores_ts - base_t[:, None]), jnp.exp2(most_t - base_t)
        sum_te = sum_te * shrink_t[:, None] + _dot(p_ts.astype(v_Se.dtype), v_Se[rows, :], NN)
        return more_t, sum_t * shrink_t + p_ts.sum(axis=1), sum_te

    zeros_t = jnp.zeros((t,), jnp.float32)
    carry = zeros_t - jnp.inf, zeros_t, jnp.zeros(o_te.shape, jnp.float32)
    full, end = _key_tiles(tile, v_Se.shape[0] // s, k_ids_S is not None, how)
    carry = _loop(0, full, partial(step, masked=False), carry)
    most_t, sum_t, sum_te = _loop(full, end, partial(step, masked=True), carry)
    seen_t = sum_t > 0
    sum_t = jnp.where(seen_t, sum_t, 1.0)
    o_te[...] = (sum_te / sum_t[:, None]).astype(o_te.dtype)
    lse_t[...] = jnp.where(seen_t, most_t + jnp.log(sum_t) * LOG2_E, jnp.inf)


def backward_queries(queries, keys, v_Se, q_ids_t, k_ids_S, do_te, lse_t, delta_t, dqueries, *, how: How) -> None:
    """The gradient of one tile of queries of one head. delta is the sum of o * do over the head."""
    tile, t, s = pl.program_id(0), how.t, how.s
    parts, do, lse_t1, delta_t1 = (
        [q_td[...] for q_td in queries],
        do_te[...],
        lse_t[...][:, None],
        delta_t[...][:, None],
    )

    def step(j, dparts, masked):
        rows = pl.ds(j * s, s)
        k_parts = [k_Sd[rows, :] for k_Sd in keys]
        scores_ts = _scores(parts, k_parts, how)
        if masked:
            scores_ts = _hide(scores_ts, _rows(tile, t, q_ids_t, ..., 0), _rows(j, s, k_ids_S, rows, 1), how)
        dp_ts = _dot(do, v_Se[rows, :], NT) - delta_t1
        ds_ts = (jnp.exp2(scores_ts - lse_t1) * dp_ts).astype(do.dtype)
        return tuple(dq_td + _dot(ds_ts, k_sd, NN) for dq_td, k_sd in zip(dparts, k_parts, strict=True))

    dparts = tuple(jnp.zeros(q_td.shape, jnp.float32) for q_td in queries)
    full, end = _key_tiles(tile, v_Se.shape[0] // s, k_ids_S is not None, how)
    dparts = _loop(0, full, partial(step, masked=False), dparts)
    dparts = _loop(full, end, partial(step, masked=True), dparts)
    for dq_td, dpart_td in zip(dqueries, dparts, strict=True):
        dq_td[...] = (dpart_td * how.scale).astype(dq_td.dtype)


def backward_keys(queries, keys, v_se, q_ids_T, k_ids_s, do_TGe, lse_GT, delta_GT, dkeys, dv_se, *, how: How) -> None:
    """The gradients of one tile of keys and values of one head, summed over the query heads that use it.

    Scores have the keys as rows: then they need not be turned for the products that follow.
    """
    tile, t, s = pl.program_id(0), how.t, how.s
    parts, v = [k_sd[...] for k_sd in keys], v_se[...]
    n = do_TGe.shape[0] // t
    first, full = _query_tiles(tile, n, q_ids_T is not None, how)

    def step(g, i, carry, masked):
        dparts, sum_se = carry
        rows = pl.ds(i * t, t)
        q_parts, do_te = [q_TGd[rows, g, :] for q_TGd in queries], do_TGe[rows, g, :]
        scores_st = _scores(parts, q_parts, how)
        if masked:
            scores_st = _hide(scores_st, _rows(i, t, q_ids_T, rows, 1), _rows(tile, s, k_ids_s, ..., 0), how)
        p_st = jnp.exp2(scores_st - lse_GT[g, rows][None, :])
        ds_st = (p_st * (_dot(v, do_te, NT) - delta_GT[g, rows][None, :])).astype(v.dtype)
        dparts = tuple(dk_sd + _dot(ds_st, q_td, NN) for dk_sd, q_td in zip(dparts, q_parts, strict=True))
        return dparts, sum_se + _dot(p_st.astype(v.dtype), do_te, NN)

    def head(g, carry):
        carry = _loop(first, full, partial(step, g, masked=True), carry)
        return _loop(full, n, partial(step, g, masked=False), carry)

    zeros = tuple(jnp.zeros(k_sd.shape, jnp.float32) for k_sd in keys), jnp.zeros(v_se.shape, jnp.float32)
    dparts, sum_se = _loop(0, do_TGe.shape[1], head, zeros)
    for dk_sd, dpart_sd in zip(dkeys, dparts, strict=True):
        dk_sd[...] = (dpart_sd * how.scale).astype(dk_sd.dtype)
    dv_se[...] = sum_se.astype(dv_se.dtype)


def _dot(a: jax.Array, b: jax.Array, contracted: Any, precision: Any = None) -> jax.Array:
    return jax.lax.dot_general(a, b, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _features(q_td, frequencies_dF, angles_F, rotary_t) -> list[jax.Array]:
    """Cosines and sines of the queries' phases; see `trig_features`."""
    phases_tF = _dot(q_td[...], frequencies_dF[...], NN, jax.lax.Precision.HIGHEST)
    if angles_F is not None:
        phases_tF += rotary_t[...].astype(jnp.float32)[:, None] * angles_F[...][None, :]
    return [f(phases_tF).astype(q_td.dtype) for f in (jnp.cos, jnp.sin)]


def _scores(a_parts: list, b_parts: list, how: How) -> jax.Array:
    """Of the rows of the one with the rows of the other, times log2(e)."""
    products = [_dot(a, b, NT) for a, b in zip(a_parts, b_parts, strict=True)]
    return reduce(jnp.add, products) * (how.scale * LOG2_E)


def _rows(tile: Any, n: int, ids: Any, which: Any, axis: int) -> tuple[jax.Array, jax.Array | None]:
    """Indices and segment ids of the n rows of a tile, along the axis of the scores that counts them."""
    index, other = tile * n + jnp.arange(n), 1 - axis
    return jnp.expand_dims(index, other), None if ids is None else jnp.expand_dims(ids[which], other)


def _hide(scores: jax.Array, q_rows: Any, k_rows: Any, how: How) -> jax.Array:
    """-inf where a query does not see a key."""
    (q_index, q_ids), (k_index, k_ids) = q_rows, k_rows
    seen = k_index < how.n_keys
    if how.causal:
        seen &= q_index >= k_index
    if k_ids is not None:
        seen &= (q_ids == k_ids) & (k_ids != 0)
    return jnp.where(seen, scores, -jnp.inf)


def _key_tiles(q_tile: Any, n: int, segmented: bool, how: How) -> tuple[Any, Any]:
    """A tile of queries sees all of the key tiles before the first number, and nothing of those from the second on."""
    full, end = (0 if segmented else how.n_keys // how.s), n
    if how.causal:
        begin = q_tile * how.t
        end = jnp.minimum(n, _div(begin + how.t + how.s - 1, how.s))
        full = 0 if segmented else jnp.minimum(full, _div(begin + 1, how.s))
    return full, end


def _query_tiles(k_tile: Any, n: int, segmented: bool, how: How) -> tuple[Any, Any]:
    """A tile of keys is seen by no row of the query tiles before the first number, and by all from the second on.

    Keys that are padding need no care here: what they receive is cut off.
    """
    first, full = 0, n if segmented else 0
    if how.causal:
        begin = k_tile * how.s
        first = _div(begin, how.t)
        full = n if segmented else jnp.minimum(n, _div(begin + how.s + how.t - 2, how.t))
    return first, full


def _div(a: jax.Array, b: int) -> jax.Array:
    """a // b of numbers that are not negative."""
    return jax.lax.div(a, jnp.asarray(b, a.dtype))


def _loop(start: Any, stop: Any, body: Callable, carry: Any) -> Any:
    """fori_loop; nothing where it is known to be empty."""
    if isinstance(start, int) and isinstance(stop, int) and start >= stop:
        return carry
    return jax.lax.fori_loop(start, stop, body, carry)
