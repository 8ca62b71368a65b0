"""What the operations know of the kernels: when they apply, and how they are called. Imports pallas only when asked."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stackwise_jax.kernels import dispatch

MIN_SIZE = 16  # of each side of a product
# What registers and shared memory of a multiprocessor hold of a row: the size of a part of a head, and bytes of all.
MAX_SIZE, MAX_BYTES = 256, 2048


def padded_size(n: int) -> int:
    """The size that a kernel takes for n: a power of two."""
    return max(MIN_SIZE, 1 << (n - 1).bit_length())


def obstacle(*arrays: jax.Array, sizes: Sequence[int], positions: bool) -> str | None:
    """Why the kernels cannot compute this; None: they can.

    Args:
        arrays: queries, keys and values.
        sizes: of all parts of heads that a kernel holds.
        positions: explicit ones are given, so that the order is not that of the rows.
    """
    capability = dispatch.cuda_capability()
    if capability is None or capability < 8:
        return "it needs an NVIDIA GPU of compute capability 8.0"
    if jax.device_count() > 1:
        return "it cannot be spread over several devices"
    if positions:
        return "it knows no explicit positions"
    dtypes = {x.dtype for x in arrays}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(name) for name in ("bfloat16", "float16", "float32")}:
        return f"it needs one dtype of bfloat16, float16 and float32, not {', '.join(sorted(map(str, dtypes)))}"
    if max(sizes) > MAX_SIZE or sum(map(padded_size, sizes)) * arrays[0].dtype.itemsize > MAX_BYTES:
        return f"it takes parts of heads of sizes up to {MAX_SIZE}, {MAX_BYTES} bytes together, not {list(sizes)}"
    try:
        _flash()
    except ImportError as error:
        return f"this version of jax has no back end for it ({error})"
    return None


def refusal(function: str, arrays: Mapping[str, jax.Array | None], **static: Any) -> str | None:
    """What the compiler has against a function of `flash` and its gradient, for arrays of these shapes; None: nothing.

    Whether a tile fits into registers and shared memory is known only to it. Each case is compiled once.
    """
    shapes = tuple((name, x.shape, x.dtype) for name, x in arrays.items() if x is not None)
    return _refusal(function, shapes, tuple(static.items()))


@functools.cache
def _refusal(function: str, shapes: tuple[tuple, ...], static: tuple[tuple[str, Any], ...]) -> str | None:
    arrays = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in shapes}
    floats = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    rest = {name: x for name, x in arrays.items() if name not in floats}

    def total(floats: dict[str, jax.Array], rest: dict[str, jax.Array]) -> jax.Array:
        return getattr(_flash(), function)(**floats, **rest, **dict(static)).astype(jnp.float32).sum()

    try:
        jax.jit(jax.grad(total)).lower(floats, rest).compile()
    except Exception as error:  # whatever it is: another implementation can do the case
        return f"it does not compile here ({str(error).strip().splitlines()[0][:200]})"
    return None


def attention_pallas(*args: jax.Array, **options: Any) -> jax.Array:
    """See `flash.flash_attention`."""
    return _flash().flash_attention(*args, **options)


def feature_attention_pallas(*args: jax.Array, **options: Any) -> jax.Array:
    """See `flash.feature_flash_attention`."""
    return _flash().feature_flash_attention(*args, **options)


def _flash() -> Any:
    return importlib.import_module("stackwise_jax.kernels.pallas.flash")
