"""Flash attention with its gradient, over heads themselves and over random features of them.

Nothing that is quadratic in the sequence is held, forwards or backwards: residuals are the arguments, the output, and
one number per row and head; scores, and features, are computed again. Sizes that the kernels cannot take are filled up
with zeros, which changes neither scores nor outputs, and rows with rows that nobody sees.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads, d and e sizes of a query-key head and
of a value head, r size of the part that all heads share, F frequencies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stackwise_jax.kernels import dispatch
from stackwise_jax.kernels.feature_attention.features import trig_features
from stackwise_jax.kernels.pallas import calls
from stackwise_jax.kernels.pallas.calls import Ids, Parts, Settings, Tiles, Tiling
from stackwise_jax.kernels.pallas.entry import padded_size


def flash_attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    *,
    causal: bool,
    scale: float,
    q_shared_BTHr: jax.Array | None = None,
    k_shared_BSr: jax.Array | None = None,
    q_segment_ids_BT: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `attention`; `obstacle` says what it can do.

    Args:
        tiling: None: by the sizes. Static.
        interpret: compile with XLA and not with Triton, for any device. Static.
    """
    queries, keys = (q_BTHd,), (k_BSKd,)
    if q_shared_BTHr is not None and k_shared_BSr is not None:
        queries, keys = (q_BTHd, q_shared_BTHr), (k_BSKd, k_shared_BSr[:, :, None])
    queries, keys = (tuple(_with_size(x) for x in parts) for parts in (queries, keys))
    T, (S, e), v = q_BTHd.shape[1], v_BSKe.shape[1::2], _with_size(v_BSKe)
    tiling = _fitted(tiling or default_tiling(sum(x.shape[3] for x in (*queries, v)), v.dtype), T, S)
    settings, (t, s) = Settings(causal, scale, S, tiling, interpret), _tile_rows(tiling)
    queries, keys = tuple(_with_rows(q, t) for q in queries), tuple(_with_rows(k, s) for k in keys)
    ids = _with_ids(q_segment_ids_BT, kv_segment_ids_BS, t, s)
    return _flash(settings, queries, keys, _with_rows(v, s), ids)[:, :T, :, :e]


def feature_flash_attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKe: jax.Array,
    frequencies_dF: jax.Array,
    *,
    causal: bool,
    scale: float,
    angles_F: jax.Array | None = None,
    q_rotary_BT: jax.Array | None = None,
    kv_rotary_BS: jax.Array | None = None,
    q_segment_ids_BT: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `feature_attention`. The features of the keys are computed once, those of the queries inside the kernel.

    angles_F, q_rotary_BT and kv_rotary_BS: all or none. tiling, interpret: as for `flash_attention`.
    """
    (B, T), (S, e), F = q_BTHd.shape[:2], v_BSKe.shape[1::2], frequencies_dF.shape[1]
    q, k, v = _with_size(q_BTHd), _with_size(k_BSKd), _with_size(v_BSKe)
    tiling = _fitted(tiling or default_tiling(2 * padded_size(F) + v.shape[3], v.dtype), T, S)
    settings, (t, s) = Settings(causal, scale / F, S, tiling, interpret), _tile_rows(tiling)
    frequencies_dF = jnp.pad(frequencies_dF, ((0, q.shape[3] - q_BTHd.shape[3]), (0, 0)))
    feature_map = FeatureMap(frequencies_dF, None, None, None)
    if angles_F is not None and q_rotary_BT is not None and kv_rotary_BS is not None:
        q_rotary_BT, kv_rotary_BS = jnp.broadcast_to(q_rotary_BT, (B, T)), jnp.broadcast_to(kv_rotary_BS, (B, S))
        feature_map = FeatureMap(frequencies_dF, angles_F, _with_rows(q_rotary_BT, t), _with_rows(kv_rotary_BS, s))
    ids = _with_ids(q_segment_ids_BT, kv_segment_ids_BS, t, s)
    o_BTHe = _feature_flash(settings, _with_rows(q, t), _with_rows(k, s), _with_rows(v, s), feature_map, ids)
    return o_BTHe[:, :T, :, :e]


class FeatureMap(NamedTuple):
    """What makes phases of heads; the last three are there together or not at all."""

    frequencies_dF: jax.Array
    angles_F: jax.Array | None
    q_rotary_BT: jax.Array | None
    kv_rotary_BS: jax.Array | None


def _value(settings: Settings, queries: Parts, keys: Parts, v_BSKe: jax.Array, ids: Ids) -> jax.Array:
    return calls.forward(settings, queries, keys, v_BSKe, ids)[0]


_flash = jax.custom_vjp(_value, nondiff_argnums=(0,))


def _forward(settings: Settings, queries: Parts, keys: Parts, v_BSKe: jax.Array, ids: Ids):
    o_BTHe, lse_BHT = calls.forward(settings, queries, keys, v_BSKe, ids)
    return o_BTHe, (queries, keys, v_BSKe, ids, o_BTHe, lse_BHT)


def _backward(settings: Settings, residuals: Any, do_BTHe: jax.Array):
    queries, keys, v_BSKe, ids, o_BTHe, lse_BHT = residuals
    return *calls.backward(settings, queries, keys, v_BSKe, ids, o_BTHe, lse_BHT, do_BTHe), None  # None: zero


_flash.defvjp(_forward, _backward)


def _feature_value(settings: Settings, q_BTHd, k_BSKd, v_BSKe, feature_map: FeatureMap, ids: Ids) -> jax.Array:
    return _feature_forward(settings, q_BTHd, k_BSKd, v_BSKe, feature_map, ids)[0]


_feature_flash = jax.custom_vjp(_feature_value, nondiff_argnums=(0,))


def _feature_forward(settings: Settings, q_BTHd, k_BSKd, v_BSKe, feature_map: FeatureMap, ids: Ids):
    frequencies_dF, angles_F, q_rotary_BT, kv_rotary_BS = feature_map
    keys = _features(k_BSKd, frequencies_dF, angles_F, kv_rotary_BS)
    # A frequency of 0 that fills up the size has the cosine 1 in the queries, but 0 in the keys.
    angles = None if angles_F is None else _with_size(angles_F.astype(jnp.float32))
    in_kernel = _with_size(frequencies_dF).astype(q_BTHd.dtype), angles, q_rotary_BT
    o_BTHe, lse_BHT = calls.forward(settings, (q_BTHd,), keys, v_BSKe, ids, in_kernel)
    return o_BTHe, (q_BTHd, k_BSKd, v_BSKe, feature_map, ids, o_BTHe, lse_BHT)


def _feature_backward(settings: Settings, residuals: Any, do_BTHe: jax.Array):
    q_BTHd, k_BSKd, v_BSKe, feature_map, ids, o_BTHe, lse_BHT = residuals
    frequencies_dF, angles_F, q_rotary_BT, kv_rotary_BS = feature_map

    def features(x_BTHd, rotary_BT) -> tuple[Parts, Callable]:
        return jax.vjp(lambda x, w, a: _features(x, w, a, rotary_BT), x_BTHd, frequencies_dF, angles_F)

    (queries, of_queries), (keys, of_keys) = features(q_BTHd, q_rotary_BT), features(k_BSKd, kv_rotary_BS)
    dqueries, dkeys, dv_BSKe = calls.backward(settings, queries, keys, v_BSKe, ids, o_BTHe, lse_BHT, do_BTHe)
    dq_BTHd, *dmap_q = of_queries(dqueries)
    dk_BSKd, *dmap_k = of_keys(dkeys)
    dfrequencies_dF, dangles_F = jax.tree.map(jnp.add, dmap_q, dmap_k)
    return dq_BTHd, dk_BSKd, dv_BSKe, FeatureMap(dfrequencies_dF, dangles_F, None, None), None


_feature_flash.defvjp(_feature_forward, _feature_backward)


def _features(x_BTHd, frequencies_dF, angles_F, rotary_BT) -> Parts:
    cos_BTHF, sin_BTHF = trig_features(x_BTHd, frequencies_dF, angles_F, rotary_BT)
    return _with_size(cos_BTHF), _with_size(sin_BTHF)


def default_tiling(width: int, dtype: Any) -> Tiling:
    """Tiles such that what a program holds fits into the registers and the shared memory of a multiprocessor.

    They were chosen by what the Triton compiler makes of them for compute capabilities 9.0 and 8.9: as large as can be
    with few registers spilled.

    Args:
        width: sizes of the parts of a query-key head and of a value head, together.
    """
    n_bytes, capability = width * jnp.dtype(dtype).itemsize, dispatch.cuda_capability()
    if capability is not None and not 9 <= capability < 12:
        n_bytes *= 2  # others have half of the shared memory, or little more
    if n_bytes <= 512:
        return Tiling(Tiles(128, 64, 8, 3), Tiles(128, 64, 8), Tiles(32, 128, 8))
    if n_bytes <= 768:
        return Tiling(Tiles(128, 64, 8, 3), Tiles(128, 64, 8), Tiles(64, 64, 8))
    if n_bytes <= 1536:
        return Tiling(Tiles(64, 32, 8), Tiles(64, 32, 8), Tiles(32, 32, 8))
    return Tiling(Tiles(32, 16, 4), Tiles(16, 16, 4), Tiles(16, 16, 4))


def _fitted(tiling: Tiling, T: int, S: int) -> Tiling:
    """Tiles that are not much larger than the sequences."""

    def fitted(tiles: Tiles) -> Tiles:
        return dataclasses.replace(tiles, t=min(tiles.t, padded_size(T)), s=min(tiles.s, padded_size(S)))

    return Tiling(fitted(tiling.forward), fitted(tiling.queries), fitted(tiling.keys))


def _tile_rows(tiling: Tiling) -> tuple[int, int]:
    """What T and S have to be multiples of."""
    tiles = tiling.forward, tiling.queries, tiling.keys
    return max(x.t for x in tiles), max(x.s for x in tiles)


def _with_size(x: jax.Array) -> jax.Array:
    """The last axis filled up with zeros."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, padded_size(x.shape[-1]) - x.shape[-1]),))


def _with_rows(x_BT: jax.Array, multiple: int) -> jax.Array:
    """The rows filled up with zeros."""
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % multiple)) + ((0, 0),) * (x_BT.ndim - 2))


def _with_ids(q_ids_BT: jax.Array | None, kv_ids_BS: jax.Array | None, t: int, s: int) -> Ids:
    """Rows are filled up with padding, id 0."""
    if q_ids_BT is None or kv_ids_BS is None:
        return None, None
    return _with_rows(jnp.asarray(q_ids_BT), t), _with_rows(jnp.asarray(kv_ids_BS), s)
