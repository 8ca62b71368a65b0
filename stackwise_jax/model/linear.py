"""Products with the matrices of a block: stored in one precision and used in another, with adapters beside them and,
if asked, a bound on their largest singular value.

Legend: N anything, I inputs, O outputs, R rank of an adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from stackwise_jax.memory.quantized import Implementation, QuantizedTensor, dequantize, matmul
from stackwise_jax.model.spec import Params, dtype_of
from stackwise_jax.random_streams import root_key

if TYPE_CHECKING:
    from stackwise_jax.model.block import Block

# The branch that each matrix stands in. Randomness is keyed by the place in this list: new names go to its end.
MATRICES = {"q": "attn", "k": "attn", "v": "attn", "o": "attn", "gate": "mlp", "up": "mlp", "down": "mlp"}
MATRICES |= dict.fromkeys(("q_a", "q_b", "kv_a", "kv_b", "k_a", "k_b", "v_a", "v_b"), "attn")
RESIDUAL_GAIN = 0.2  # of the matrices that write into the residual stream; see Block
POWER_ITERATIONS = 30  # within about 2 % of the largest singular value even where many lie close to it (random ones)


def init_kernel(key: jax.Array, n_in: int, n_out: int, dtype: Any, gain: float = 1.0) -> jax.Array:
    """A normal (n_in, n_out) matrix with standard deviation gain / sqrt(n_in): outputs have the scale of the inputs."""
    return (jax.random.normal(key, (n_in, n_out), jnp.float32) * (gain * n_in**-0.5)).astype(dtype)


def linear(
    x_NI: jax.Array,
    params: Params,
    dtype: Any,
    dropout_key: jax.Array | None = None,
    spectral_norm: float = 0.0,
    quantized_matmul: Implementation = "dequantize",
) -> jax.Array:
    """x @ kernel in `dtype`, plus scale * (x @ a) @ b for each adapter; all are cast at use. (..., I) -> (..., O).

    params: {"kernel": (I, O)[, "adapters": {name: {"a": (I, R), "b": (R, O), "scale": ()[, "dropout": ()]}}]}. An
    adapter that holds "dropout" drops that share of its own input if there is a key (Hu et al. 2021); the product
    with the kernel sees all of x. spectral_norm above 0 bounds the kernel, not the adapters; see bound_kernel. A kernel
    that is a QuantizedTensor gets no gradient; quantized_matmul says how it is multiplied (memory.quantized.matmul).
    """
    kernel_IO, x_NI = params["kernel"], x_NI.astype(dtype)
    if isinstance(kernel_IO, QuantizedTensor):
        y_NO = matmul(x_NI, kernel_IO, dtype, quantized_matmul)
        if spectral_norm > 0.0:  # after the product, so that no dense kernel is kept for the backward pass
            y_NO = y_NO * _bound(dequantize(kernel_IO, jnp.float32), spectral_norm).astype(dtype)
    else:
        if spectral_norm > 0.0:
            kernel_IO = bound_kernel(kernel_IO, spectral_norm)
        y_NO = jnp.matmul(x_NI, kernel_IO.astype(dtype))
    for i, (_, adapter) in enumerate(sorted(params.get("adapters", {}).items())):
        key = None if dropout_key is None or "dropout" not in adapter else jax.random.fold_in(dropout_key, i)
        y_NO = y_NO + _adapted(x_NI, adapter, dtype, key)
    return y_NO


def project(
    block: Block, params: Params, name: str, x_NI: jax.Array, dropout_key: jax.Array | None = None
) -> jax.Array:
    """x through one of the matrices of a block, as the block uses them all; params holds the matrices by name."""
    key = None if dropout_key is None else jax.random.fold_in(dropout_key, [*MATRICES].index(name))
    dtype = dtype_of(block.compute_dtype)
    return linear(x_NI, params[name], dtype, key, block.spectral_norm, block.quantized_matmul)


def dense_kernel(block: Block, params: Params, name: str) -> jax.Array:
    """The matrix (I, O) that `project` without dropout multiplies with, adapters in it.

    In the compute dtype, and with adapters in float32: in bf16 most entries of a small update would vanish beside those
    of the kernel. What is quantized is dequantized, whatever quantized_matmul says.
    """
    kernel_IO, adapters = params[name]["kernel"], params[name].get("adapters", {})
    if isinstance(kernel_IO, QuantizedTensor):
        kernel_IO = dequantize(kernel_IO, jnp.float32)
    if block.spectral_norm > 0.0:
        kernel_IO = bound_kernel(kernel_IO, block.spectral_norm)
    kernel_IO = kernel_IO.astype(dtype_of(block.compute_dtype))
    for adapter in adapters.values():
        a_IR, b_RO, scale = (adapter[leaf].astype(jnp.float32) for leaf in ("a", "b", "scale"))
        kernel_IO = kernel_IO.astype(jnp.float32) + jnp.matmul(a_IR * scale, b_RO, precision="highest")
    return kernel_IO


def bound_kernel(kernel_IO: jax.Array, limit: float) -> jax.Array:
    """kernel * min(1, limit / sigma) in float32, sigma its largest singular value.

    Power iteration finds the singular vectors u and v from a fixed start; sigma = u W v, and gradients flow through
    that W only, not through u and v (spectral normalization, Miyato et al. 2018). The estimate is never above sigma, so
    the result may exceed the limit by a few percent.
    """
    kernel_IO = kernel_IO.astype(jnp.float32)
    return kernel_IO * _bound(kernel_IO, limit)


def _bound(kernel_IO: jax.Array, limit: float) -> jax.Array:
    """min(1, limit / sigma) of a float32 matrix."""
    fixed_IO = jax.lax.stop_gradient(kernel_IO)
    v_O = _unit(jax.random.normal(root_key(0), kernel_IO.shape[1:]))
    with jax.default_matmul_precision("highest"):
        improve = lambda _, v_O: _unit(_unit(fixed_IO @ v_O) @ fixed_IO)
        v_O = jax.lax.fori_loop(0, POWER_ITERATIONS, improve, v_O)
        sigma = _unit(fixed_IO @ v_O) @ kernel_IO @ v_O
    return limit / jnp.maximum(sigma, limit)


def _adapted(x_NI: jax.Array, adapter: Params, dtype: Any, dropout_key: jax.Array | None) -> jax.Array:
    if dropout_key is not None:
        kept = 1.0 - adapter["dropout"].astype(jnp.float32)
        kept_NI = jax.random.bernoulli(dropout_key, kept, x_NI.shape)
        x_NI = jnp.where(kept_NI, x_NI / kept.astype(dtype), jnp.zeros((), dtype))
    low_NR = jnp.matmul(x_NI, adapter["a"].astype(dtype)) * adapter["scale"].astype(dtype)
    return jnp.matmul(low_NR, adapter["b"].astype(dtype))


def _unit(x_N: jax.Array) -> jax.Array:
    return x_N / (jnp.linalg.norm(x_N) + 1e-20)
