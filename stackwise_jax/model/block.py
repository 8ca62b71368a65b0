"""A transformer block: pre-norm attention and feed-forward, a residual around each.

Legend: B batch, T sequence, S new positions while decoding, D d_model.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stackwise_jax.memory.quantized import Implementation
from stackwise_jax.model.attention import (
    attention_shapes,
    cached_attention,
    init_attention,
    init_attention_cache,
    self_attention,
)
from stackwise_jax.model.mlp import init_mlp, mlp, mlp_shapes
from stackwise_jax.model.norm import init_norm, rms_norm
from stackwise_jax.model.spec import Params, dtype_of, module_params, require

ATTENTION_MODES = ("bidirectional", "causal")
QUANTIZED_MATMULS = ("dequantize", "native")


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); no biases.

    Initial values: matrices are normal with standard deviation 1 / sqrt(n_in), those that write into the residual
    stream (`o` and `down`) with a fifth of that (GPT-2's 1 / sqrt(2 * blocks) at 12 blocks, but the same at any depth,
    so that regrouping and growing change no initial value); norm scales are one. Embedding and head are the Rack's.
    With `freeze_up_proj` the up-projection keeps its initial values for good: `partition.split_fixed` keeps it out of
    what learns.

    The residual stream and the matrices work in `compute_dtype`; norms, softmax and RoPE angles in float32. Dropout is
    on the two branches, just before they are added. Two options for deep or long training: `residual_gain` multiplies
    both branches (x + gain * branch), `spectral_norm` bounds the largest singular value that each matrix acts with,
    to a few percent (linear.bound_kernel); it bounds the weights alone, adapters are added to the bounded product.

    Parameters: {"attn_norm": {"scale"}, "attn": {"q", "k", "v", "o"}, "mlp_norm": {"scale"}, "mlp": {"gate", "up",
    "down"}}, each matrix {"kernel": (in, out)}, and "adapters" next to it where there are some (see linear.linear).
    A kernel that does not learn may be a QuantizedTensor; `quantized_matmul` says how it is multiplied
    (memory.quantized.matmul).

    Raises:
        UsageError: a field is impossible; the sentence names the key.
    """

    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int | None = None  # None: as many as n_heads
    attention_mode: str = "causal"
    dropout: float = 0.0
    freeze_up_proj: bool = True
    use_rope: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    residual_gain: float = 1.0
    spectral_norm: float = 0.0  # 0: no bound
    param_dtype: str = "fp32"
    compute_dtype: str = "fp32"
    quantized_matmul: Implementation = "dequantize"

    def __post_init__(self):
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        self._validate()
        super().__post_init__()

    @nn.nowrap
    def _validate(self):
        for name in ("d_model", "d_ff", "n_heads", "n_kv_heads"):
            require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; write at least 1")
        require(
            self.d_model % self.n_heads == 0,
            f"model.n_heads {self.n_heads} does not divide model.d_model {self.d_model}; write a divisor of it",
        )
        require(
            self.n_heads % self.kv_heads == 0,
            f"model.n_kv_heads {self.n_kv_heads} does not divide model.n_heads {self.n_heads}; write a divisor of it",
        )
        require(
            not self.use_rope or self.head_dim % 2 == 0,
            f"model.use_rope needs an even head size, and model.d_model / model.n_heads is {self.head_dim}; "
            "change model.n_heads or set model.use_rope false",
        )
        require(self.rope_theta > 0, f"model.rope_theta is {self.rope_theta}; write a positive number")
        require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}; write a share from 0 to below 1")
        require(self.residual_gain > 0, f"model.residual_gain is {self.residual_gain}; write a number above 0")
        require(
            self.spectral_norm >= 0,
            f"model.spectral_norm is {self.spectral_norm}; write a bound above 0, or 0 for none",
        )
        check_mode(self.attention_mode)
        require(
            self.quantized_matmul in QUANTIZED_MATMULS,
            f"model.quantized_matmul is '{self.quantized_matmul}'; write one of {[*QUANTIZED_MATMULS]}",
        )
        for dtype in (self.param_dtype, self.compute_dtype):
            dtype_of(dtype)

    @property
    def kv_heads(self) -> int:
        """Key/value heads, never None."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each matrix, by name."""
        return attention_shapes(self) | mlp_shapes(self)

    @property
    def activation_dtype(self) -> Any:
        """The dtype of what goes in and comes out."""
        return dtype_of(self.compute_dtype)

    @nn.nowrap
    def init_params(self, key: jax.Array) -> Params:
        """The initial parameters, a pure function of (spec, key)."""
        norm_dtype = dtype_of(self.param_dtype)
        return {
            "attn_norm": init_norm(self.d_model, norm_dtype),
            "attn": init_attention(self, jax.random.fold_in(key, 0)),
            "mlp_norm": init_norm(self.d_model, norm_dtype),
            "mlp": init_mlp(self, jax.random.fold_in(key, 1)),
        }

    @nn.nowrap
    def init_cache(self, batch: int, max_len: int, dtype: Any) -> Params:
        """An empty key/value cache for `decode`: {"k", "v": (B, max_len, n_kv_heads, head_dim)}."""
        return init_attention_cache(self, batch, max_len, dtype)

    @nn.nowrap
    def parameter_count(self, trainable_only: bool = False) -> int:
        """Numbers in the block; with `trainable_only` without a frozen up-projection."""
        fixed = self.d_model * self.d_ff if trainable_only and self.freeze_up_proj else 0
        return sum(n_in * n_out for n_in, n_out in self.matrices.values()) + 2 * self.d_model - fixed

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        attention_mode: str | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """(B, T, D) -> (B, T, D) in compute_dtype.

        positions_BT (for RoPE) default to 0..T-1. Positions of different segment_ids do not see each other, and nobody
        sees 0 (padding). Causality is by index within the row, whatever the positions say. attention_mode overrides the
        block's own. dropout_key None: no dropout, neither the block's nor that of adapters.
        """
        params = module_params(self, self.init_params)
        mode = check_mode(attention_mode or self.attention_mode)
        if positions_BT is None:
            positions_BT = jnp.arange(x_BTD.shape[1])[None]
        adapter_key = None if dropout_key is None else jax.random.fold_in(dropout_key, 2)
        x_BTD = x_BTD.astype(dtype_of(self.compute_dtype))
        branch_BTD = self_attention(
            self,
            params["attn"],
            rms_norm(x_BTD, params["attn_norm"], self.norm_eps),
            positions_BT,
            segment_ids_BT,
            mode == "causal",
            adapter_key,
        )
        x_BTD = self._add(x_BTD, self._drop(branch_BTD, dropout_key, 0))
        branch_BTD = mlp(self, params["mlp"], rms_norm(x_BTD, params["mlp_norm"], self.norm_eps), adapter_key)
        return self._add(x_BTD, self._drop(branch_BTD, dropout_key, 1))

    def decode(self, x_BSD: jax.Array, positions_BS: jax.Array, cache: Params) -> tuple[jax.Array, Params]:
        """S new positions, causally, over what the cache holds: (y_BSD, cache); positions are indices into it."""
        params = module_params(self, self.init_params)
        x_BSD = x_BSD.astype(dtype_of(self.compute_dtype))
        normed_BSD = rms_norm(x_BSD, params["attn_norm"], self.norm_eps)
        branch_BSD, cache = cached_attention(self, params["attn"], normed_BSD, positions_BS, cache)
        x_BSD = self._add(x_BSD, branch_BSD)
        branch_BSD = mlp(self, params["mlp"], rms_norm(x_BSD, params["mlp_norm"], self.norm_eps))
        return self._add(x_BSD, branch_BSD), cache

    @nn.nowrap
    def _add(self, x_BTD: jax.Array, branch_BTD: jax.Array) -> jax.Array:
        return x_BTD + (branch_BTD if self.residual_gain == 1.0 else self.residual_gain * branch_BTD)

    @nn.nowrap
    def _drop(self, x_BTD: jax.Array, key: jax.Array | None, place: int) -> jax.Array:
        if key is None or self.dropout == 0.0:
            return x_BTD
        kept_BTD = jax.random.bernoulli(jax.random.fold_in(key, place), 1.0 - self.dropout, x_BTD.shape)
        return jnp.where(kept_BTD, x_BTD / (1.0 - self.dropout), jnp.zeros((), x_BTD.dtype))


def check_mode(mode: str) -> str:
    """The attention mode, if it is one.

    Raises:
        UsageError: it is not.
    """
    require(
        mode in ATTENTION_MODES,
        f"attention mode '{mode}' is unknown (model.attention_mode); write one of {[*ATTENTION_MODES]}",
    )
    return mode
