"""Linear attention over chunks of rows, each chunk reading what the rows before it have summed up in a state.

Legend: B batch, T rows (S of the keys where they may be others), H query heads, K key/value heads, G = H / K,
M features, e value size, n chunks, c rows per chunk (s those of its keys).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from stackwise_jax.kernels.linear_attention.reference import normalise

CHUNK = 128  # rows


class LinearState(NamedTuple):
    """All that a causal row needs of the rows before it: sum over them of k v^T and of k, float32."""

    sum_BKMe: jax.Array
    norm_BKM: jax.Array


def init_linear_state(batch: int, n_kv_heads: int, features: int, value_dim: int) -> LinearState:
    """The state before the first row; its size does not depend on how many rows there will be."""
    sum_BKMe = jnp.zeros((batch, n_kv_heads, features, value_dim), jnp.float32)
    return LinearState(sum_BKMe, jnp.zeros(sum_BKMe.shape[:3], jnp.float32))


class Passed(NamedTuple):
    """The state of the rows that the scan has passed, and the segment which they belong to; None without segments."""

    state: LinearState
    segment_B: jax.Array | None


def linear_attention_chunked(
    q_BTHM: jax.Array,
    k_BSKM: jax.Array,
    v_BSKe: jax.Array,
    *,
    causal: bool,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """See `linear_attention`; holds a state per chunk and the weights of one chunk, forwards and backwards."""
    B, _, K, M = k_BSKM.shape
    state = init_linear_state(B, K, M, v_BSKe.shape[3])
    if not causal and segment_ids_BT is None:
        sums_BTHe, norms_BTH = read(absorb(state, k_BSKM, v_BSKe), q_BTHM)
        return normalise(sums_BTHe, norms_BTH).astype(v_BSKe.dtype)
    passed = Passed(state, None if segment_ids_BT is None else jnp.zeros_like(segment_ids_BT[:, 0]))
    _, sums_BTHe, norms_BTH = scan_chunks(passed, q_BTHM, k_BSKM, v_BSKe, segment_ids_BT)
    if not causal:
        _, after_BTHe, after_BTH = scan_chunks(passed, q_BTHM, k_BSKM, v_BSKe, segment_ids_BT, reverse=True)
        sums_BTHe, norms_BTH = sums_BTHe + after_BTHe, norms_BTH + after_BTH
    return normalise(sums_BTHe, norms_BTH).astype(v_BSKe.dtype)


def absorb(state: LinearState, k_BSKM: jax.Array, v_BSKe: jax.Array) -> LinearState:
    """The state after these rows too."""
    sum_BKMe = jnp.einsum("BSKM,BSKe->BKMe", k_BSKM, v_BSKe, preferred_element_type=jnp.float32)
    return LinearState(state.sum_BKMe + sum_BKMe, state.norm_BKM + k_BSKM.sum(axis=1, dtype=jnp.float32))


def read(state: LinearState, q_BTHM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What queries find in a state, float32: the sum of weighted values (B, T, H, e) and that of weights (B, T, H)."""
    B, T, H, M = q_BTHM.shape
    K, e = state.sum_BKMe.shape[1], state.sum_BKMe.shape[3]
    q_BTKGM = q_BTHM.reshape(B, T, K, H // K, M).astype(jnp.float32)
    sums_BTKGe = jnp.einsum("BTKGM,BKMe->BTKGe", q_BTKGM, state.sum_BKMe)
    norms_BTKG = jnp.einsum("BTKGM,BKM->BTKG", q_BTKGM, state.norm_BKM)
    return sums_BTKGe.reshape(B, T, H, e), norms_BTKG.reshape(B, T, H)


def scan_chunks(
    passed: Passed,
    q_BTHM: jax.Array,
    k_BTKM: jax.Array,
    v_BTKe: jax.Array,
    segment_ids_BT: jax.Array | None,
    reverse: bool = False,
) -> tuple[Passed, jax.Array, jax.Array]:
    """Unnormalised sums (B, T, H, e) and norms (B, T, H) over the rows of the own segment up to and with the own.

    With `reverse` over those after the own. Also returns what has been passed at the end.
    """
    B, T = q_BTHM.shape[:2]
    n = -(-T // CHUNK)
    c = -(-T // n)

    def chunks(x_BT):
        """(B, T, ...) -> (n, B, c, ...); rows added at the end have features of 0, and segment 0."""
        if x_BT is None:
            return None
        x_BT = jnp.pad(x_BT, ((0, 0), (0, n * c - T)) + ((0, 0),) * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(B, n, c, *x_BT.shape[2:]), 1, 0)

    def rows(x_nBc):
        return jnp.moveaxis(x_nBc, 0, 1).reshape(B, n * c, *x_nBc.shape[3:])[:, :T]

    @jax.checkpoint
    def body(passed, chunk):
        q_BcHM, k_BcKM, v_BcKe, ids_Bc = chunk
        k_BcKM, v_BcKe = k_BcKM.astype(jnp.float32), v_BcKe.astype(jnp.float32)
        sums_BcHe, norms_BcH = _within(q_BcHM, k_BcKM, v_BcKe, ids_Bc, reverse)
        old_BcHe, old_BcH = read(passed.state, q_BcHM)
        if ids_Bc is not None:
            same_Bc1 = ((ids_Bc == passed.segment_B[:, None]) & (ids_Bc != 0))[..., None]
            old_BcHe, old_BcH = jnp.where(same_Bc1[..., None], old_BcHe, 0.0), jnp.where(same_Bc1, old_BcH, 0.0)
        return _pass(passed, k_BcKM, v_BcKe, ids_Bc, reverse), (sums_BcHe + old_BcHe, norms_BcH + old_BcH)

    xs = tuple(map(chunks, (q_BTHM, k_BTKM, v_BTKe, segment_ids_BT)))
    passed, (sums_nBcHe, norms_nBcH) = jax.lax.scan(body, passed, xs, reverse=reverse)
    return passed, rows(sums_nBcHe), rows(norms_nBcH)


def _within(
    q_BcHM: jax.Array, k_BcKM: jax.Array, v_BcKe: jax.Array, ids_Bc: jax.Array | None, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """Sums and norms over the rows of the chunk itself."""
    B, c, H, M = q_BcHM.shape
    K, e = v_BcKe.shape[2:]
    q_BcKGM = q_BcHM.reshape(B, c, K, H // K, M).astype(jnp.float32)
    row_c1, row_1s = jnp.arange(c)[:, None], jnp.arange(c)[None]
    mask_Bcs = (row_c1 < row_1s if reverse else row_c1 >= row_1s)[None]
    if ids_Bc is not None:
        mask_Bcs = mask_Bcs & (ids_Bc[:, :, None] == ids_Bc[:, None, :]) & (ids_Bc[:, :, None] != 0)
    weights_BKGcs = jnp.einsum("BcKGM,BsKM->BKGcs", q_BcKGM, k_BcKM)
    weights_BKGcs = jnp.where(mask_Bcs[:, None, None], weights_BKGcs, 0.0)
    sums_BcKGe = jnp.einsum("BKGcs,BsKe->BcKGe", weights_BKGcs, v_BcKe)
    norms_BcKG = jnp.moveaxis(weights_BKGcs.sum(axis=-1), 3, 1)
    return sums_BcKGe.reshape(B, c, H, e), norms_BcKG.reshape(B, c, H)


def _pass(passed: Passed, k_BcKM: jax.Array, v_BcKe: jax.Array, ids_Bc: jax.Array | None, reverse: bool) -> Passed:
    """What has been passed after this chunk: of it and of what lay before, the rows of the segment that goes on."""
    if ids_Bc is None or passed.segment_B is None:
        return Passed(absorb(passed.state, k_BcKM, v_BcKe), None)
    segment_B = _last_segment(passed.segment_B, ids_Bc[:, ::-1] if reverse else ids_Bc)
    goes_on_B111 = (passed.segment_B == segment_B)[:, None, None, None]
    sum_BKMe = jnp.where(goes_on_B111, passed.state.sum_BKMe, 0.0)
    norm_BKM = jnp.where(goes_on_B111[..., 0], passed.state.norm_BKM, 0.0)
    k_BcKM = jnp.where(((ids_Bc == segment_B[:, None]) & (ids_Bc != 0))[:, :, None, None], k_BcKM, 0.0)
    return Passed(absorb(LinearState(sum_BKMe, norm_BKM), k_BcKM, v_BcKe), segment_B)


def _last_segment(before_B: jax.Array, ids_Bc: jax.Array) -> jax.Array:
    """The segment of the last row that is no padding, which ends no segment; where all are padding, the one before."""
    last_B = ids_Bc.shape[1] - 1 - jnp.argmax(ids_Bc[:, ::-1] != 0, axis=1)
    ids_B = jnp.take_along_axis(ids_Bc, last_B[:, None], axis=1)[:, 0]
    return jnp.where(ids_B != 0, ids_B, before_B)
