"""Weights in fewer bits: a matrix as small codes with a scale per block of its input rows.

    format  codes        block  scales                                   bits per weight
    int8    int8           128  fp32                                     8.25
    fp8     fp8 (e4m3)     128  fp32                                     8.25
    nf4     4 bits          64  fp8 (e4m3), times one fp32 per matrix    4.125
    nvfp4   4 bits (e2m1)   16  fp8 (e4m3), times one fp32 per matrix    4.5

nf4: the levels and the double quantization of QLoRA (Dettmers et al. 2023), here with fp8 scales and no offset. nvfp4:
as Nvidia's format, with two levels of scales. Codes are chosen for the scale as it is stored.

A block is a run of rows within one column, of the length above or, where the rows cannot be cut into such blocks, of
the next smaller length that cuts them evenly; a few rows of zeros at the end make up for what is left.

A block that holds a number that is not finite gets the scale NaN, so all of it dequantizes to NaN.

fp8 numbers are kept as their bits, in uint8: a backend without fp8 arithmetic would widen fp8 arrays that pass through
a loop, all blocks of a stack at once and not only the one that is at work.

Legend: L any leading axes, I inputs, O outputs, N anything, C blocks along I, K rows of a block, P bytes of a block
in one column.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

QUANTIZED = ("int8", "fp8", "nf4", "nvfp4")
DENSE = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}
Implementation = Literal["dequantize", "native"]

# Quantiles of the normal distribution within [-1, 1] (QLoRA, appendix E), and the values of e2m1 by their bits.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
E2M1_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_LEVELS = (*E2M1_SIZES, *(-size for size in E2M1_SIZES))

FP8 = jnp.float8_e4m3fn
FP8_LARGEST, FP8_SMALLEST = 448.0, 2.0**-9
# Scales stay normal numbers: subnormal ones are zero on some devices, and blocks of zeros need one to divide by too.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
# A hair below the largest float32, so that code times scale does not round to inf.
LARGEST_WEIGHT = float(np.finfo(np.float32).max) * (1 - 2.0**-20)
# Above this the inverse of a divisor is subnormal: a division that is done as a product would give 0.
LARGEST_DIVISOR = 2.0**125


class _Scheme(NamedTuple):
    """How a format writes a block. largest: of the codes; levels: of 4-bit codes, two to a byte, with fp8 scales."""

    block: int
    largest: float
    levels: tuple[float, ...] | None = None


_SCHEMES = {
    "int8": _Scheme(128, 127.0),
    "fp8": _Scheme(128, FP8_LARGEST),
    "nf4": _Scheme(64, 1.0, NF4_LEVELS),
    "nvfp4": _Scheme(16, 6.0, E2M1_LEVELS),
}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("payload", "scale", "scale2"), meta_fields=("fmt", "rows")
)
@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix (L, I, O), or several, in one of the formats of QUANTIZED. A pytree; `quantize` makes it.

    Every array has the leading axes L, so scanning, slicing and joining along them does what it does to a dense matrix.

    payload: the codes, (L, C * K, O) int8, or uint8 bits of fp8, or for 4 bits (L, C * P, O) uint8: byte p of a block
    holds row p in its lower and row K / 2 + p in its upper half. scale: (L, C, O) float32, or uint8 bits of fp8.
    scale2: (L, 1, 1) float32 in formats with fp8 scales, else None. fmt: the format. rows: I.
    """

    payload: Any
    scale: Any
    scale2: Any = None
    fmt: str = field(kw_only=True)
    rows: int = field(kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """(L, I, O), as of the dense matrix."""
        return (*self.payload.shape[:-2], self.rows, self.payload.shape[-1])

    @property
    def ndim(self) -> int:
        return len(self.payload.shape)

    @property
    def nbytes(self) -> int:
        """What is stored, scales included."""
        return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))


def quantize(w_LIO: Any, fmt: str) -> QuantizedTensor:
    """Matrices of any float dtype in a format of QUANTIZED. Each is quantized by itself, whatever stands beside it.

    Raises:
        ValueError: the format is none of these.
    """
    scheme = _scheme(fmt)
    rows = w_LIO.shape[-2]
    w_LCKO = _cut(jnp.asarray(w_LIO, jnp.float32), *_blocks(rows, scheme))
    scale_LCO = jnp.minimum(largest(w_LCKO, axis=-2), LARGEST_WEIGHT) / scheme.largest
    if scheme.levels is None:
        scale_LCO = jnp.maximum(scale_LCO, SMALLEST_SCALE)
        payload_LCKO = _encode(w_LCKO / scale_LCO[..., None, :], fmt)
        payload_LCKO = payload_LCKO if fmt == "int8" else _bits(payload_LCKO)
        return QuantizedTensor(_uncut(payload_LCKO), scale_LCO, fmt=fmt, rows=rows)
    fine_LCO = ~jnp.isnan(scale_LCO)
    scale2 = jnp.max(jnp.where(fine_LCO, scale_LCO, 0.0), axis=(-2, -1), keepdims=True) / FP8_LARGEST
    scale2 = jnp.maximum(scale2, SMALLEST_SCALE / FP8_SMALLEST)
    scale_LCO = jnp.where(fine_LCO, jnp.clip(scale_LCO / scale2, FP8_SMALLEST, FP8_LARGEST), jnp.nan).astype(FP8)
    divisor_LCO = scale_LCO.astype(jnp.float32) * scale2
    smaller = jnp.where(scale2 > LARGEST_DIVISOR / FP8_LARGEST, 2.0**-10, 1.0)
    w_LCKO = w_LCKO * smaller[..., None] / (divisor_LCO * smaller)[..., None, :]
    codes_LCKO = _nf4_codes(w_LCKO) if fmt == "nf4" else _e2m1_codes(w_LCKO)
    low_LCPO, high_LCPO = jnp.split(codes_LCKO, 2, axis=-2)
    return QuantizedTensor(_uncut(low_LCPO | high_LCPO << 4), _bits(scale_LCO), scale2, fmt=fmt, rows=rows)


def largest(x: jax.Array, axis: int) -> jax.Array:
    """The largest magnitude along an axis; NaN where one is not finite, which the maximum itself may pass over."""
    return jnp.where(jnp.isfinite(x).all(axis), jnp.abs(x).max(axis), jnp.nan)


def dequantize(q: QuantizedTensor, dtype: Any) -> jax.Array:
    """The matrices (L, I, O), computed in float32 and cast. No gradient flows to `q`."""
    q = jax.tree.map(jax.lax.stop_gradient, q)
    levels, n_blocks = _scheme(q.fmt).levels, q.scale.shape[-2]
    w_LCKO = _cut(q.payload, n_blocks, q.payload.shape[-2] // n_blocks)
    if levels is None:
        w_LCKO = _codes(w_LCKO, q.fmt).astype(jnp.float32)
    else:
        w_LCKO = jnp.concatenate([_decode(w_LCKO & 15, levels), _decode(w_LCKO >> 4, levels)], axis=-2)
    return _uncut((w_LCKO * _scales(q)[..., None, :]).astype(dtype))[..., : q.rows, :]


def matmul(x_NI: jax.Array, q: QuantizedTensor, dtype: Any, implementation: Implementation) -> jax.Array:
    """x @ w in `dtype` for one matrix w: (..., I) -> (..., O). Only x gets a gradient.

    Nothing dense outlives the product: the backward pass dequantizes anew.

    Args:
        implementation: dequantize: w is brought to `dtype` first. native: int8 and fp8 codes are multiplied as they
            are with x quantized alike, per row and block of inputs; sums in int32 or float32, and in float32 over the
            blocks. Its gradient is that of dequantize. 4-bit formats are always dequantized.
    """
    return _matmul(x_NI.astype(dtype), q, dtype, implementation)


def to_format(tree: Any, fmt: str) -> Any:
    """The tree of a stack (nested dicts) with its weights in another format.

    To a format of QUANTIZED every "kernel" is quantized and all else stays as it is; to one of DENSE every leaf is
    cast. What is quantized otherwise is dequantized first. Adapters and the head are not for this: theirs stay dense.

    Raises:
        ValueError: the format is unknown.
    """
    if isinstance(tree, dict):
        return {name: _kernel(leaf, fmt) if name == "kernel" else to_format(leaf, fmt) for name, leaf in tree.items()}
    return tree if fmt in QUANTIZED else _cast(tree, fmt)


def formats_of(tree: Any) -> set[str]:
    """How the kernels of a tree (nested dicts) are stored: formats of QUANTIZED, or "dense"."""
    found: set[str] = set()
    for name, leaf in tree.items():
        if isinstance(leaf, dict):
            found |= formats_of(leaf)
        elif name == "kernel":
            found.add(leaf.fmt if isinstance(leaf, QuantizedTensor) else "dense")
    return found


def dense_format(fmt: str) -> str:
    """The format in which embedding and head, which are never quantized, are kept beside stacks in `fmt`."""
    return "bf16" if fmt in QUANTIZED else fmt


def bits_per_weight(fmt: str) -> float:
    """Bits of a format per entry of a matrix, scales included; padding and scales per matrix are not.

    Raises:
        ValueError: the format is unknown.
    """
    if fmt in DENSE:
        return 8.0 * np.dtype(DENSE[fmt]).itemsize
    scheme = _scheme(fmt)
    code, scale = (8, 32) if scheme.levels is None else (4, 8)
    return code + scale / scheme.block


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x_NI: jax.Array, q: QuantizedTensor, dtype: Any, implementation: Implementation) -> jax.Array:
    if implementation == "native" and _scheme(q.fmt).levels is None:
        return _native(x_NI, q).astype(dtype)
    return jnp.matmul(x_NI, dequantize(q, dtype))


def _forward(x_NI: jax.Array, q: QuantizedTensor, dtype: Any, implementation: Implementation):
    return _matmul(x_NI, q, dtype, implementation), q


def _backward(dtype: Any, implementation: Implementation, q: QuantizedTensor, dy_NO: jax.Array):
    return jnp.matmul(dy_NO, dequantize(q, dtype).T), None


_matmul.defvjp(_forward, _backward)


def _native(x_NI: jax.Array, q: QuantizedTensor) -> jax.Array:
    """The product of codes with codes, block by block, in float32."""
    scheme, n_blocks = _scheme(q.fmt), q.scale.shape[-2]
    sums = jnp.int32 if q.fmt == "int8" else jnp.float32
    payload_CKO = _cut(q.payload, n_blocks, q.payload.shape[-2] // n_blocks)
    x_IN = jnp.moveaxis(x_NI.reshape(-1, q.rows), -1, 0)
    x_CKN = _cut(x_IN, n_blocks, payload_CKO.shape[-2])

    def add(y_NO: jax.Array, block: tuple[jax.Array, jax.Array, jax.Array]):
        x_KN, payload_KO, scale_O = block
        x_KN = x_KN.astype(jnp.float32)
        scale_N = jnp.maximum(largest(x_KN, axis=0) / scheme.largest, SMALLEST_SCALE)
        codes_NK = _encode(x_KN / scale_N, q.fmt).T
        product_NO = jnp.matmul(codes_NK, _codes(payload_KO, q.fmt), preferred_element_type=sums)
        return y_NO + product_NO.astype(jnp.float32) * scale_N[:, None] * scale_O, None

    y_NO = jnp.zeros((x_IN.shape[1], q.payload.shape[-1]), jnp.float32)
    y_NO = jax.lax.scan(add, y_NO, (x_CKN, payload_CKO, _scales(q)))[0]
    return y_NO.reshape(*x_NI.shape[:-1], -1)


def _scheme(fmt: str) -> _Scheme:
    if fmt not in _SCHEMES:
        raise ValueError(f"'{fmt}' is no quantized format; write one of {[*QUANTIZED]}")
    return _SCHEMES[fmt]


def _blocks(rows: int, scheme: _Scheme) -> tuple[int, int]:
    """(C, K): the fewest blocks no longer than the scheme's, and the length that they share, even for 4 bits."""
    n_blocks = -(-rows // scheme.block)
    length = -(-rows // n_blocks)
    return n_blocks, length if scheme.levels is None else length + length % 2


def _cut(x_LIO: jax.Array, n_blocks: int, length: int) -> jax.Array:
    """(L, I, O) -> (L, C, K, O), with rows of zeros at the end where there are too few."""
    missing = n_blocks * length - x_LIO.shape[-2]
    if missing:
        x_LIO = jnp.pad(x_LIO, [(0, 0)] * (x_LIO.ndim - 2) + [(0, missing), (0, 0)])
    return x_LIO.reshape(*x_LIO.shape[:-2], n_blocks, length, x_LIO.shape[-1])


def _uncut(x_LCKO: jax.Array) -> jax.Array:
    return x_LCKO.reshape(*x_LCKO.shape[:-3], -1, x_LCKO.shape[-1])


def _scales(q: QuantizedTensor) -> jax.Array:
    """What the codes are multiplied with, (L, C, O) float32."""
    return q.scale if q.scale2 is None else _fp8(q.scale).astype(jnp.float32) * q.scale2


def _codes(payload: jax.Array, fmt: str) -> jax.Array:
    """The payload of int8 or fp8 as numbers of that kind."""
    return payload if fmt == "int8" else _fp8(payload)


def _encode(x: jax.Array, fmt: str) -> jax.Array:
    """Numbers within the range of int8 or fp8 as such, to nearest, ties to even."""
    return jnp.round(x).astype(jnp.int8) if fmt == "int8" else x.astype(FP8)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint8)


def _fp8(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, FP8)


def _nf4_codes(x: jax.Array) -> jax.Array:
    """The index of the nearest level: how many of the middles between levels lie below."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(NF4_LEVELS)]
    return sum((x > middle).astype(jnp.uint8) for middle in middles)  # type: ignore[return-value]


def _e2m1_codes(x: jax.Array) -> jax.Array:
    """The four bits of e2m1, to nearest, ties to even, saturating: the sign, two of exponent, one of mantissa."""
    size, code = jnp.abs(x), jnp.signbit(x).astype(jnp.uint8) << 3
    for i, (a, b) in enumerate(itertools.pairwise(E2M1_SIZES)):
        middle = (a + b) / 2
        code += (size >= middle if i % 2 else size > middle).astype(jnp.uint8)
    return code


def _decode(codes: jax.Array, levels: tuple[float, ...]) -> jax.Array:
    """levels[codes] in float32, as a tree of selections on the bits: it fuses where a gather would not."""
    if len(levels) == 1:
        return jnp.full(codes.shape, levels[0], jnp.float32)
    half = len(levels) // 2
    return jnp.where((codes & half).astype(bool), _decode(codes, levels[half:]), _decode(codes, levels[:half]))


def _kernel(kernel: Any, fmt: str) -> Any:
    if isinstance(kernel, QuantizedTensor):
        if kernel.fmt == fmt:
            return kernel
        kernel = dequantize(kernel, jnp.float32)
    return quantize(kernel, fmt) if fmt in QUANTIZED else _cast(kernel, fmt)


def _cast(leaf: Any, fmt: str) -> jax.Array:
    if fmt not in DENSE:
        raise ValueError(f"'{fmt}' is no format of weights; write one of {[*DENSE, *QUANTIZED]}")
    return jnp.asarray(leaf).astype(DENSE[fmt])
