"""Random kitchen sinks: random features whose inner product is, in expectation, a kernel of queries and keys.

Rahimi & Recht 2007 (random Fourier features) for the shift-invariant kernels, Choromanski et al. 2021 (positive random
features) for the Gaussian one in linear attention, Cho & Saul 2009 (arc-cosine kernel) for rectified projections.

Legend: B batch (or 1), T sequence, H heads, d head size, F frequencies (columns of the random matrix), M features, N
pairs of vectors.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from stackwise_jax.kernels.feature_attention.features import trig_features
from stackwise_jax.model.rope import rope
from stackwise_jax.model.spec import Params, require

CUT = 2.0**15  # of Cauchy entries, one in 50,000 of which is larger: fp16 ends at 2^16
TYPES = ("gaussian", "laplacian", "cauchy", "uniform", "linear")
MODES = ("softmax", "linear")
# Bandwidths to begin with. Cauchy frequencies have no variance; at 1 the largest of them make gradients very noisy.
BANDWIDTHS = dict.fromkeys(TYPES, 1.0) | {"laplacian": 16.0}
MAX_EXPONENT = 60.0  # of a positive feature of a key, and of its inverse: sums over any sequence stay inside float32


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """A kernel, the number of random features that stand for it, and the attention that is built on them.

    type: the kernel of scaled vectors (`exact_kernel`). mode: "softmax" over the features' inner products, or "linear":
    positive features, whose inner products are the attention weights themselves. features: M. bandwidth: the distance
    at which the kernel falls off, in units of the typical distance of vectors with unit entries; the linear kernel has
    none; None: that of BANDWIDTHS. learn: the random matrix learns with the block instead of staying as it was drawn.

    Raises:
        UsageError: an impossible field; the sentence names the key.
    """

    type: str
    mode: str = "softmax"
    features: int = 128
    bandwidth: float = None  # pyright: ignore[reportAssignmentType] (a number from __post_init__ on)
    learn: bool = False

    def __post_init__(self):
        require(self.type in TYPES, f"model.kernel.type is '{self.type}'; write one of {[*TYPES]}")
        if self.bandwidth is None:
            object.__setattr__(self, "bandwidth", BANDWIDTHS[self.type])
        require(self.mode in MODES, f"model.kernel.mode is '{self.mode}'; write one of {[*MODES]}")
        n, per = self.features, self.multiple_of
        require(
            n >= 1 and n % per == 0,
            f"model.kernel.features is {n}; write {'at least 1' if per == 1 else f'a multiple of {per}'} for "
            f"model.kernel.type {self.type} and model.kernel.mode {self.mode}",
        )
        require(
            0 < self.bandwidth < math.inf,
            f"model.kernel.bandwidth is {self.bandwidth}; write a positive number",
        )
        require(
            self.type != "linear" or self.bandwidth == 1.0,
            f"model.kernel.bandwidth is {self.bandwidth} and the linear kernel has no bandwidth; leave it out",
        )

    @property
    def exponential(self) -> bool:
        """Features are exp(w . x - |x|^2)."""
        return self.type == "gaussian" and self.mode == "linear"

    @property
    def trigonometric(self) -> bool:
        """Features are cosines and sines of phases w . x; positions enter the phases (`rotary_angles`)."""
        return self.type != "linear" and not self.exponential

    @property
    def multiple_of(self) -> int:
        """What the number of features has to be a multiple of: 2 for pairs that RoPE turns, 4 for positive ones."""
        return 2 if self.mode == "softmax" else (4 if self.trigonometric else 1)

    @property
    def columns(self) -> int:
        """Columns of the random matrix: F of trigonometric features, else M."""
        return self.features // self.multiple_of if self.trigonometric else self.features


def init_features(spec: KernelSpec, head_dim: int, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """{"matrix": (d, F)}: the random matrix as its kernel's spectral measure has it; the same key, the same matrix."""
    shape = (head_dim, spec.columns)
    draw = {
        "gaussian": jax.random.normal,
        "laplacian": lambda key, shape: jnp.clip(jax.random.cauchy(key, shape), -CUT, CUT),
        "cauchy": jax.random.laplace,
        "uniform": lambda key, shape: jax.random.uniform(key, shape, minval=-1.0, maxval=1.0),
        "linear": jax.random.normal,
    }[spec.type]
    return {"matrix": draw(key, shape).astype(dtype)}


def input_scale(spec: KernelSpec, head_dim: int) -> float:
    """What vectors are multiplied by before the kernel sees them.

    1 / (bandwidth * sqrt(d)), so that distances do not grow with the head size; 1 / (bandwidth * d) for the Laplacian,
    whose distance is a sum over entries; 1 for the linear kernel.
    """
    if spec.type == "linear":
        return 1.0
    return 1.0 / (spec.bandwidth * (head_dim if spec.type == "laplacian" else math.sqrt(head_dim)))


def score_scale(spec: KernelSpec, head_dim: int) -> float:
    """What inner products of features are multiplied by before the softmax: sqrt(M); d^-0.5 for the linear kernel."""
    return head_dim**-0.5 if spec.type == "linear" else math.sqrt(spec.features)


def frequencies(spec: KernelSpec, params: Params) -> jax.Array:
    """(d, F) float32: phases are x @ frequencies; the scale of the inputs is in them."""
    matrix_dF = params["matrix"].astype(jnp.float32)
    return matrix_dF * input_scale(spec, matrix_dF.shape[0])


def rotary_angles(spec: KernelSpec, theta: float) -> jax.Array:
    """(F,) float32: position t adds t * angles to the phases, which turns each pair (cos, sin) as RoPE turns a pair.

    phase(q, t) - phase(k, s) then depends on t - s only, for every kernel and for every draw of the matrix.
    """
    n = spec.columns
    return theta ** (-jnp.arange(n, dtype=jnp.float32) / n)


def key_features(
    spec: KernelSpec,
    params: Params,
    x_BTHd: jax.Array,
    positions_BT: jax.Array | None = None,
    theta: float = 10_000.0,
) -> jax.Array:
    """phi(x): (B, T, H, d) -> (B, T, H, M), with E[phi(x) . phi(y)] = `exact_kernel` over draws of the matrix.

    In x's dtype in softmax mode, where the frequencies enter in it too (`trig_features`); float32 and not negative in
    linear mode. Phases and exponents are float32.

    positions_BT makes them rotary. Trigonometric features (`KernelSpec.trigonometric`) take positions into their
    phases, those of the linear kernel in softmax mode are turned themselves: inner products depend on differences of
    positions exactly. Exponential and rectified features are made of vectors that RoPE has turned (d is even), and as
    these two kernels do not change under rotations, inner products depend on differences in expectation.
    """
    if spec.exponential:
        exponents_BTHM = _exponents(spec, params, x_BTHd, positions_BT, theta)
        return jnp.exp(jnp.clip(exponents_BTHM, -MAX_EXPONENT, MAX_EXPONENT)) * spec.features**-0.5
    if spec.type == "linear":
        return _projections(spec, params, x_BTHd, positions_BT, theta)
    x_BTHd = x_BTHd if spec.mode == "softmax" else x_BTHd.astype(jnp.float32)
    cos_BTHF, sin_BTHF = trig_features(x_BTHd, frequencies(spec, params), rotary_angles(spec, theta), positions_BT)
    if spec.mode == "softmax":
        return jnp.concatenate([cos_BTHF, sin_BTHF], axis=-1) * spec.columns**-0.5
    return jnp.concatenate([1 + cos_BTHF, 1 + sin_BTHF, 1 - cos_BTHF, 1 - sin_BTHF], axis=-1) * spec.features**-0.5


def query_features(
    spec: KernelSpec,
    params: Params,
    x_BTHd: jax.Array,
    positions_BT: jax.Array | None = None,
    theta: float = 10_000.0,
) -> jax.Array:
    """As `key_features`; exponential features are divided by the largest of the query's own.

    Such a factor per query cancels in linear attention, and so every query has a feature of 1 / sqrt(M).
    """
    if not spec.exponential:
        return key_features(spec, params, x_BTHd, positions_BT, theta)
    exponents_BTHM = _exponents(spec, params, x_BTHd, positions_BT, theta)
    largest_BTH1 = jax.lax.stop_gradient(exponents_BTHM.max(axis=-1, keepdims=True))
    return jnp.exp(exponents_BTHM - largest_BTH1) * spec.features**-0.5


def exact_kernel(spec: KernelSpec, x_Nd: jax.Array, y_Nd: jax.Array) -> jax.Array:
    """(N,) float32: the value that phi(x) . phi(y) has in expectation, without positions.

    With x and y scaled by `input_scale` and delta = x - y: gaussian exp(-|delta|^2 / 2), laplacian exp(-sum |delta_i|),
    cauchy prod 1 / (1 + delta_i^2), uniform prod sin(delta_i) / delta_i, linear x . y. In linear mode 1 + k / 2 for
    laplacian, cauchy and uniform, and for linear the arc-cosine kernel of order 1,
    |x| |y| (sin t + (pi - t) cos t) / pi with t the angle between x and y.
    """
    scale = input_scale(spec, x_Nd.shape[-1])
    x_Nd, y_Nd = x_Nd.astype(jnp.float32) * scale, y_Nd.astype(jnp.float32) * scale
    if spec.type == "linear":
        dot_N = jnp.sum(x_Nd * y_Nd, axis=-1)
        if spec.mode == "softmax":
            return dot_N
        norms_N = jnp.linalg.norm(x_Nd, axis=-1) * jnp.linalg.norm(y_Nd, axis=-1)
        t_N = jnp.arccos(jnp.clip(dot_N / norms_N, -1.0, 1.0))
        return norms_N * (jnp.sin(t_N) + (jnp.pi - t_N) * jnp.cos(t_N)) / jnp.pi
    delta_Nd = x_Nd - y_Nd
    k_N = {
        "gaussian": lambda: jnp.exp(-jnp.sum(delta_Nd**2, axis=-1) / 2),
        "laplacian": lambda: jnp.exp(-jnp.sum(jnp.abs(delta_Nd), axis=-1)),
        "cauchy": lambda: jnp.prod(1 / (1 + delta_Nd**2), axis=-1),
        "uniform": lambda: jnp.prod(jnp.sinc(delta_Nd / jnp.pi), axis=-1),
    }[spec.type]()
    return k_N if spec.mode == "softmax" or spec.type == "gaussian" else 1 + k_N / 2


def _exponents(
    spec: KernelSpec, params: Params, x_BTHd: jax.Array, positions_BT: jax.Array | None, theta: float
) -> jax.Array:
    """w . x - |x|^2 of scaled x: E[exp(w . x - |x|^2) exp(w . y - |y|^2)] = exp(-|x - y|^2 / 2) for normal w."""
    if positions_BT is not None:
        x_BTHd = rope(x_BTHd, positions_BT, theta)
    x_BTHd = x_BTHd.astype(jnp.float32) * input_scale(spec, x_BTHd.shape[-1])
    return _project(x_BTHd, params["matrix"]) - jnp.sum(x_BTHd**2, axis=-1, keepdims=True)


def _projections(
    spec: KernelSpec, params: Params, x_BTHd: jax.Array, positions_BT: jax.Array | None, theta: float
) -> jax.Array:
    """x R / sqrt(M), turned by RoPE; in linear mode sqrt(2 / M) relu(x R) of x turned by RoPE."""
    dtype = x_BTHd.dtype
    if positions_BT is not None and spec.mode == "linear":
        x_BTHd = rope(x_BTHd, positions_BT, theta)
    dots_BTHM = _project(x_BTHd, params["matrix"])
    if spec.mode == "linear":
        return jax.nn.relu(dots_BTHM) * (2 / spec.features) ** 0.5
    phi_BTHM = dots_BTHM * spec.features**-0.5
    if positions_BT is not None:
        phi_BTHM = rope(phi_BTHM, positions_BT, theta)
    return phi_BTHM.astype(dtype)


def _project(x_BTHd: jax.Array, matrix_dF: jax.Array) -> jax.Array:
    """x . w in float32, also where a GPU would multiply in TF32: exponents and phases are large numbers."""
    x_BTHd, matrix_dF = x_BTHd.astype(jnp.float32), matrix_dF.astype(jnp.float32)
    return jnp.einsum("BTHd,dF->BTHF", x_BTHd, matrix_dF, precision=jax.lax.Precision.HIGHEST)
