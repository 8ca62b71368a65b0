"""A transformer block: pre-norm attention and feed-forward, a residual around each.

Legend: B batch, T sequence, S new positions while decoding, D d_model.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from stackwise_jax.kernels.attention.api import Implementation as AttentionImplementation
from stackwise_jax.memory.quantized import Implementation
from stackwise_jax.model.attention import (
    SHAPES,
    attention_shapes,
    cached_attention,
    init_attention,
    init_attention_cache,
    self_attention,
)
from stackwise_jax.model.features import KernelSpec
from stackwise_jax.model.mla import MLASpec
from stackwise_jax.model.mlp import init_mlp, mlp, mlp_shapes
from stackwise_jax.model.norm import init_norm, rms_norm
from stackwise_jax.model.spec import Params, dtype_of, module_params, require, size_of, unbound
from stackwise_jax.random_streams import root_key

ATTENTION_TYPES = (*SHAPES,)
ATTENTION_IMPLEMENTATIONS = get_args(AttentionImplementation)
ATTENTION_MODES = ("bidirectional", "causal")
QUANTIZED_MATMULS = ("dequantize", "native")


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); no biases.

    Initial values: matrices are normal with standard deviation 1 / sqrt(n_in), those that write into the residual
    stream (`o` and `down`) with a fifth of that (GPT-2's 1 / sqrt(2 * blocks) at 12 blocks, but the same at any depth,
    so that regrouping and growing change no initial value); norm scales are one. Embedding and head are the Rack's.
    With `freeze_up_proj` the up-projection keeps its initial values for good, and so does the random matrix of a kernel
    unless `kernel.learn`: `partition.split_fixed` keeps them out of what learns.

    Attention: `attention_type` says how queries, keys and values are made. mha and gqa are told apart by n_kv_heads
    alone; mla and low_rank have their sizes in `mla`. `kernel` puts a kernel's random features in the place of their
    products (model/attention.py). `attention_implementation` asks for a way to compute it (kernels/attention/api.py).

    The residual stream and the matrices work in `compute_dtype`; norms, softmax and RoPE angles in float32. Dropout is
    on the two branches, just before they are added. Two options for deep or long training: `residual_gain` multiplies
    both branches (x + gain * branch), `spectral_norm` bounds the largest singular value that each matrix acts with,
    to a few percent (linear.bound_kernel); it bounds the weights alone, adapters are added to the bounded product.

    Parameters: {"attn_norm": {"scale"}, "attn": {"q", "k", "v", "o"}, "mlp_norm": {"scale"}, "mlp": {"gate", "up",
    "down"}}, each matrix {"kernel": (in, out)}, and "adapters" next to it where there are some (see linear.linear).
    Other attention has other matrices in "attn" (`matrices`), norms and "features" (attention.init_attention).
    A kernel that does not learn may be a QuantizedTensor; `quantized_matmul` says how it is multiplied
    (memory.quantized.matmul).

    Raises:
        UsageError: a field is impossible; the sentence names the key.
    """

    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int | None = None  # None: as many as n_heads
    attention_type: str = "mha"
    mla: MLASpec | None = None  # None: the usual sizes where attention_type needs some
    kernel: KernelSpec | None = None  # None: a softmax over the products of queries and keys
    attention_implementation: AttentionImplementation = "auto"
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
        self._validate_attention()
        self._validate()
        super().__post_init__()

    @nn.nowrap
    def _validate_attention(self):
        """Refuse impossible attention; of equal blocks make equal specs."""
        for name in ("d_model", "d_ff", "n_heads", "n_kv_heads"):
            require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; write at least 1")
        kind, sized = self.attention_type, self.attention_type in ("mla", "low_rank")
        require(
            kind in ATTENTION_TYPES,
            f"attention type '{kind}' is unknown (model.attention_type); write one of {[*ATTENTION_TYPES]}",
        )
        require(
            kind == "mla" or self.d_model % self.n_heads == 0,
            f"model.n_heads {self.n_heads} does not divide model.d_model {self.d_model}; write a divisor of it",
        )
        require(
            self.n_heads % self.kv_heads == 0,
            f"model.n_kv_heads {self.n_kv_heads} does not divide model.n_heads {self.n_heads}; write a divisor of it",
        )
        require(
            sized or self.mla is None,
            f"model.mla is given and model.attention_type is {kind}; write mla or low_rank there, or leave it out",
        )
        require(
            self.attention_implementation in ATTENTION_IMPLEMENTATIONS,
            f"model.attention_implementation is '{self.attention_implementation}'; write one of "
            f"{[*ATTENTION_IMPLEMENTATIONS]}",
        )
        if not sized:
            object.__setattr__(self, "attention_type", "mha" if self.kv_heads == self.n_heads else "gqa")
        elif kind == "low_rank" or self.mla is None:
            ranks = {} if self.mla is None else {"rq": self.mla.rq, "rkv": self.mla.rkv}
            object.__setattr__(self, "mla", MLASpec.of(self.d_model, self.n_heads, **ranks))
        elif not self.rotates:  # there is no rotary part, so blocks do not differ by its size
            usual = MLASpec.of(self.d_model, self.n_heads, nope_dim=self.mla.nope_dim)
            object.__setattr__(self, "mla", dataclasses.replace(self.mla, rope_dim=usual.rope_dim))
        if self.use_rope:
            self._validate_rotation()

    @nn.nowrap
    def _validate_rotation(self):
        """RoPE turns pairs of entries of a head, unless it has a rotary part or features of phases."""
        parted = self.rotates and self.attention_type == "mla"
        if parted or (self.kernel is not None and (self.kernel.trigonometric or self.kernel.mode == "softmax")):
            return
        key = "model.mla.nope_dim" if self.attention_type == "mla" else "model.d_model / model.n_heads"
        require(
            self.qk_dim % 2 == 0,
            f"model.use_rope needs an even head size, and {key} is {self.qk_dim}; change it or set "
            "model.use_rope false",
        )

    @nn.nowrap
    def _validate(self):
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
        """d_model cut into heads; the sizes of latent attention are its own."""
        return self.d_model // self.n_heads

    @property
    def latent(self) -> MLASpec | None:
        """The sizes of latent attention; None: the block has another."""
        return self.mla if self.attention_type == "mla" else None

    @property
    def qk_dim(self) -> int:
        """Size of a query or key head, of latent attention without its rotary part."""
        return self.head_dim if self.latent is None else self.latent.nope_dim

    @property
    def v_dim(self) -> int:
        """Size of a value head."""
        return self.head_dim if self.latent is None else self.latent.v_dim

    @property
    def rotary_dim(self) -> int:
        """Size of the rotary part that a head of latent attention has beside qk_dim."""
        return self.latent.rope_dim if self.latent is not None and self.rotates else 0

    @property
    def rotates(self) -> bool:
        """Whether queries and keys, or parts of them, are rotated; positions enter a kernel with its features."""
        return self.use_rope and self.kernel is None

    @property
    def fixed(self) -> tuple[tuple[str, str], ...]:
        """(branch, name) of the parameters that never learn."""
        up = (("mlp", "up"),) if self.freeze_up_proj else ()
        return up if self.kernel is None or self.kernel.learn else (*up, ("attn", "features"))

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
    def init_cache(self, batch: int, max_len: int, dtype: Any) -> Any:
        """An empty cache for `decode`: {"k", "v": (B, max_len, n_kv_heads, head_dim)}, or what other attention keeps
        (attention.init_attention_cache)."""
        return init_attention_cache(self, batch, max_len, dtype)

    @nn.nowrap
    def parameter_count(self, trainable_only: bool = False) -> int:
        """Numbers in the block; with `trainable_only` without what is fixed."""
        shapes = _shapes(unbound(self))  # pyright: ignore[reportArgumentType]
        fixed = sum(size_of(shapes[branch][name]) for branch, name in self.fixed)
        return size_of(shapes) - (fixed if trainable_only else 0)

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

    def decode(
        self, x_BSD: jax.Array, positions_BS: jax.Array, cache: Any, valid_BS: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """S new positions, causally, over what the cache holds: (y_BSD, cache); positions are indices into it.

        valid_BS: False where a position is padding or will be decoded again; None: nowhere.
        """
        params = module_params(self, self.init_params)
        x_BSD = x_BSD.astype(dtype_of(self.compute_dtype))
        normed_BSD = rms_norm(x_BSD, params["attn_norm"], self.norm_eps)
        branch_BSD, cache = cached_attention(self, params["attn"], normed_BSD, positions_BS, cache, valid_BS)
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


@functools.cache
def _shapes(block: Block) -> Params:
    """The shapes of a block's parameters."""
    return jax.eval_shape(block.init_params, root_key(0))


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
