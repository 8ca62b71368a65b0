"""Flash attention as calls of Pallas' Triton back end: which tile of which array a program of the grid gets.

Arrays come with T and S multiples of the tiles, and with sizes that are powers of two. Nothing is transposed or
repeated in memory. Of the axes of a grid, that of the tiles changes fastest, so that programs that run together read
the same keys and values.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads, G = H / K, P heads of a part of the
keys (K, or 1 if all heads share it), d and e sizes of a part of a query-key head and of a value head, F frequencies,
t query rows and s key rows of a tile.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from stackwise_jax.kernels.pallas import bodies
from stackwise_jax.kernels.pallas.bodies import How

# From jax 0.11 on each lowering says that this back end will go; what will follow concerns this folder alone.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

Parts = tuple[jax.Array, ...]
Ids = tuple[jax.Array, jax.Array] | tuple[None, None]


@dataclass(frozen=True)
class Tiles:
    """Rows of queries and of keys per tile, powers of two of at least 16; the warps that work on a pair of tiles; how
    many of the tiles that pass by are held, so that some are read while one is worked on."""

    t: int
    s: int
    warps: int
    stages: int = 2


@dataclass(frozen=True)
class Tiling:
    """Tiles of the forward pass, and of the gradients of queries and of keys and values."""

    forward: Tiles
    queries: Tiles
    keys: Tiles


@dataclass(frozen=True)
class Settings:
    """What is known when kernels are compiled; see `How`. interpret: compile with XLA and not with Triton."""

    causal: bool
    scale: float
    n_keys: int
    tiling: Tiling
    interpret: bool


def forward(settings: Settings, queries: Parts, keys: Parts, v_BSKe: jax.Array, ids: Ids, feature_map: Any = None):
    """(o_BTHe in v's dtype, the log2 of the sums of 2^scores_BHT in float32).

    Args:
        queries, keys: parts q_BTHd and k_BSPd.
        ids: segment ids of queries (B, T) and keys (B, S), int32; or None for both.
        feature_map: (frequencies_dF, angles_F, rotary_BT), the last two or both None: the single part of the queries is
            mapped to cosines and sines, the two parts of which the keys already consist. None: no map.
    """
    (B, T, H), (S, _, e) = queries[0].shape[:3], v_BSKe.shape[1:]
    t = settings.tiling.forward.t
    maps = None
    if feature_map is not None:
        maps = _where_given(feature_map, _constant(feature_map[0]), _constant(feature_map[1]), _ids(t))
    call = _call(
        bodies.forward,
        settings,
        settings.tiling.forward,
        grid=(T // t, H, B),
        in_specs=(
            tuple(_rows_of_head(t, q.shape[3]) for q in queries),
            tuple(_all_of_head(k, H) for k in keys),
            _all_of_head(v_BSKe, H),
            *_where_given(ids, _ids(t), _all_ids(S)),
            maps,
        ),
        out_specs=(_rows_of_head(t, e), _row_of_head(t)),
        out_shape=(
            jax.ShapeDtypeStruct((B, T, H, e), v_BSKe.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ),
    )
    return call(queries, keys, v_BSKe, *ids, feature_map)


def backward(
    settings: Settings, queries: Parts, keys: Parts, v_BSKe: jax.Array, ids: Ids, o_BTHe, lse_BHT, do_BTHe
) -> tuple[Parts, Parts, jax.Array]:
    """Gradients of the parts of queries and keys, and of v, in their dtypes; the scores are computed again by tiles."""
    do_BTHe = do_BTHe.astype(v_BSKe.dtype)
    delta_BHT = jnp.einsum("BTHe,BTHe->BHT", o_BTHe, do_BTHe, preferred_element_type=jnp.float32)
    args = settings, queries, keys, v_BSKe, ids, do_BTHe, lse_BHT, delta_BHT
    return _queries_backward(*args), *_keys_backward(*args)


def _queries_backward(settings: Settings, queries, keys, v_BSKe, ids, do_BTHe, lse_BHT, delta_BHT) -> Parts:
    (B, T, H), (S, _, e) = queries[0].shape[:3], v_BSKe.shape[1:]
    t = settings.tiling.queries.t
    q_specs = tuple(_rows_of_head(t, q.shape[3]) for q in queries)
    call = _call(
        bodies.backward_queries,
        settings,
        settings.tiling.queries,
        grid=(T // t, H, B),
        in_specs=(
            q_specs,
            tuple(_all_of_head(k, H) for k in keys),
            _all_of_head(v_BSKe, H),
            *_where_given(ids, _ids(t), _all_ids(S)),
            _rows_of_head(t, e),
            _row_of_head(t),
            _row_of_head(t),
        ),
        out_specs=(q_specs,),
        out_shape=(tuple(jax.ShapeDtypeStruct(q.shape, q.dtype) for q in queries),),
    )
    return call(queries, keys, v_BSKe, *ids, do_BTHe, lse_BHT, delta_BHT)[0]


def _keys_backward(settings: Settings, queries, keys, v_BSKe, ids, do_BTHe, lse_BHT, delta_BHT):
    (B, T, H), (S, K, e) = queries[0].shape[:3], v_BSKe.shape[1:]
    G, s = H // K, settings.tiling.keys.s

    def grouped(x_BTHd):
        return x_BTHd.reshape(B, T, K, G, x_BTHd.shape[3])

    def all_rows(d):
        """All rows of the query heads of a key/value head: (T, G, d)."""
        return pl.BlockSpec((None, T, None, G, d), lambda j, k, b: (b, 0, k, 0, 0))

    per_row = pl.BlockSpec((None, None, G, T), lambda j, k, b: (b, k, 0, 0))
    # A part that several key/value heads share gets a gradient from each; they are summed in float32.
    dtypes = [k.dtype if k.shape[2] == K else jnp.float32 for k in keys]
    call = _call(
        bodies.backward_keys,
        settings,
        settings.tiling.keys,
        grid=(S // s, K, B),
        in_specs=(
            tuple(all_rows(q.shape[3]) for q in queries),
            tuple(_rows_of_head(s, k.shape[3], K // k.shape[2]) for k in keys),
            _rows_of_head(s, e),
            *_where_given(ids, _all_ids(T), _ids(s)),
            all_rows(e),
            per_row,
            per_row,
        ),
        out_specs=(tuple(_rows_of_head(s, k.shape[3]) for k in keys), _rows_of_head(s, e)),
        out_shape=(
            tuple(jax.ShapeDtypeStruct((B, S, K, k.shape[3]), d) for k, d in zip(keys, dtypes, strict=True)),
            jax.ShapeDtypeStruct(v_BSKe.shape, v_BSKe.dtype),
        ),
    )
    per_head = [x.reshape(B, K, G, T) for x in (lse_BHT, delta_BHT)]
    dkeys, dv_BSKe = call(tuple(map(grouped, queries)), keys, v_BSKe, *ids, grouped(do_BTHe), *per_head)
    summed = [dk.reshape(*k.shape[:3], -1, k.shape[3]).sum(3) for dk, k in zip(dkeys, keys, strict=True)]
    return tuple(dk.astype(k.dtype) for dk, k in zip(summed, keys, strict=True)), dv_BSKe


def _call(body: Callable, settings: Settings, tiles: Tiles, **specs: Any) -> Callable:
    how = How(settings.causal, settings.scale, settings.n_keys, tiles.t, tiles.s)
    return pl.pallas_call(
        partial(body, how=how),
        interpret=settings.interpret,
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        **specs,
    )


def _head(h: jax.Array, each: int) -> jax.Array | int:
    """h // each."""
    return h if each == 1 else jax.lax.div(h, jnp.asarray(each, h.dtype))


def _rows_of_head(rows: int, size: int, each: int = 1) -> pl.BlockSpec:
    """The tile's rows of the head, or of the head that `each` heads share."""
    return pl.BlockSpec((None, rows, None, size), lambda i, h, b: (b, i, _head(h, each), 0))


def _all_of_head(x_BSPd: jax.Array, n_heads: int) -> pl.BlockSpec:
    _, S, P, d = x_BSPd.shape
    return pl.BlockSpec((None, S, None, d), lambda i, h, b: (b, 0, _head(h, n_heads // P), 0))


def _row_of_head(rows: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, rows), lambda i, h, b: (b, h, i))


def _ids(rows: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, rows), lambda i, h, b: (b, i))


def _all_ids(rows: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, rows), lambda i, h, b: (b, 0))


def _constant(x: jax.Array | None) -> pl.BlockSpec | None:
    return None if x is None else pl.BlockSpec(x.shape, lambda i, h, b: (0,) * x.ndim)


def _where_given(arrays: tuple[jax.Array | None, ...], *specs: pl.BlockSpec | None) -> tuple[pl.BlockSpec | None, ...]:
    return tuple(None if x is None else spec for x, spec in zip(arrays, specs, strict=True))
