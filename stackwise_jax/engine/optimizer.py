"""Optimizers, made of optax's parts, and learning-rate schedules.

The learning rate is not part of the optimizer: it is computed on the host for each step and multiplies the update
inside the step as a traced scalar, so that phases of unlike length or rate share one compiled step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from stackwise_jax.config.schema import OptimizerConfig
from stackwise_jax.memory.placement import STACKED
from stackwise_jax.memory.quantized import largest
from stackwise_jax.model import dtype_of

Tree = Any
MOMENTUM = ("mu", "trace")  # the names that optax gives it


def _leaf_name(path) -> str:
    return str(getattr(path[-1], "key", path[-1]))


def decay_mask(tree):
    """True on matrices (leaves named `kernel`); embeddings and norm scales do not decay."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _leaf_name(path) == "kernel", tree)


def _muon_dimensions(tree):
    """Muon takes the matrices of the stacks, each block's own; embedding, head and norms fall to Adam (Jordan 2024)."""

    def dimensions(path, leaf):
        in_stack = str(getattr(path[0], "key", path[0])) == "stacks"
        if not (in_stack and _leaf_name(path) == "kernel"):
            return None
        return contrib.MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, tree)


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer of a phase at learning rate 1; the step multiplies its update by the scheduled rate.

    Moments are computed in float32 whatever the weights are; see `_kept_in_dtypes` for how they are kept.

    Args:
        cfg: name, betas, weight decay (decoupled, on matrices only) and dtype of the momentum. Clipping and rounding
            are no part of it: engine/update.py.
    """
    decay = cfg.weight_decay
    decayed = optax.add_decayed_weights(-decay, mask=decay_mask)
    if cfg.name == "adamw":
        rule = optax.adamw(1.0, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=decay, mask=decay_mask)
    elif cfg.name == "adamw8bit":
        rule = optax.chain(scale_by_adam_8bit(cfg.b1, cfg.b2, cfg.eps), optax.scale(-1.0), decayed)
    elif cfg.name == "lion":
        rule = optax.lion(1.0, b1=cfg.b1, b2=cfg.b2, weight_decay=decay, mask=decay_mask)
    elif cfg.name == "adafactor":
        rule = optax.adafactor(1.0, weight_decay_rate=decay or None, weight_decay_mask=decay_mask)
    elif cfg.name == "sgd":
        rule = optax.chain(optax.sgd(1.0, momentum=cfg.b1 or None), decayed)
    else:
        muon = contrib.muon(
            1.0,
            beta=cfg.b1,
            eps=cfg.eps,
            adam_b1=cfg.b1,
            adam_b2=cfg.b2,
            muon_weight_dimension_numbers=_muon_dimensions,
            consistent_rms=0.2,  # updates as large as Adam's, so that one learning rate serves both (Liu et al. 2025)
        )
        # Decayed out here, because optax's own decay of muon leaves out the head's matrix, which falls to Adam.
        rule = optax.chain(muon, decayed)
    return _kept_in_dtypes(rule, None if cfg.state_dtype is None else dtype_of(cfg.state_dtype))


def _kept_in_dtypes(rule: optax.GradientTransformation, momentum: Any) -> optax.GradientTransformation:
    """The rule, computed in float32, with its state kept in dtypes of our choice between the steps.

    Momentum is kept in `momentum`, or in the dtype of the weights if that is None. The rest (second moments) is kept in
    float32: optax would keep that in the dtype of the weights too, and in bf16 a mean with a decay of 0.999 stands
    still, because what a step changes is less than half of its last digit.
    """

    def keep(path, leaf: jax.Array) -> jax.Array:
        if any(getattr(entry, "name", None) in MOMENTUM for entry in path):
            return leaf if momentum is None else leaf.astype(momentum)
        return _exact(leaf)

    def init(params):
        return jax.tree_util.tree_map_with_path(keep, rule.init(params))

    def update(updates, state, params=None):
        # The state too: what optax multiplies a bf16 momentum by is rounded to bf16 before, 0.9 to 0.898.
        updates, new = rule.update(_exact(updates), _exact(state), _exact(params))
        return updates, jax.tree.map(lambda n, o: n.astype(o.dtype), new, state)

    return optax.GradientTransformation(init, update)


def _exact(tree: Tree) -> Tree:
    """The tree with its floating-point numbers in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


BLOCK_8BIT = 256  # numbers that share a scale
CHUNK_8BIT = 2**24  # of larger leaves so many numbers are in float32 at a time


class Adam8BitState(NamedTuple):
    """Both moments of Adam with a byte for each number."""

    count: jax.Array  # int32
    m_codes: Tree  # int8, shaped as the weights
    m_tops: Tree  # float32, one per block
    root_v_codes: Tree  # uint8, shaped as the weights
    root_v_tops: Tree  # float32, one per block


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015) whose moments rest in 8 bits: 2 + 8 / 256 bytes per weight, instead of 8.

    A block is a run of 256 numbers of a leaf that share a scale (Dettmers et al. 2022). Under `blocks`, where
    axis 0 counts the blocks of stacks, no run reaches over it, so that state can be cut and joined along it as weights
    are. Of the second moment its root is kept, which spans half as many orders of magnitude.
    """

    def init(params):
        def zeros(path, p):
            # What _encode makes of zeros, which the compiler would work out number by number.
            rows = _rows(path)
            tops = jnp.zeros((*p.shape[:rows], -(-math.prod(p.shape[rows:]) // BLOCK_8BIT)), jnp.float32)
            return jnp.zeros(p.shape, jnp.int8), tops, jnp.zeros(p.shape, jnp.uint8), tops

        return Adam8BitState(jnp.zeros([], jnp.int32), *_unzip(jax.tree_util.tree_map_with_path(zeros, params), params))

    def update(updates, state, params=None):
        count: Any = optax.safe_increment(state.count)
        unbias, unbias_v = 1 - b1**count, 1 - b2**count

        def moved(rows, start, g, m_codes, m_tops, root_v_codes, root_v_tops):
            m = b1 * _decode(m_codes, m_tops, rows) + (1 - b1) * g
            v = b2 * jnp.square(_decode(root_v_codes, root_v_tops, rows)) + (1 - b2) * jnp.square(g)
            direction = (m / unbias) / (jnp.sqrt(v / unbias_v) + eps)
            codes = *_encode(m, jnp.int8, rows, count, start), *_encode(jnp.sqrt(v), jnp.uint8, rows, count, start)
            return direction, *codes

        one = lambda path, *leaves: _in_chunks(moved, _rows(path), *leaves)
        found = jax.tree_util.tree_map_with_path(one, updates, *state[1:])
        directions, *moments = _unzip(found, updates)
        return directions, Adam8BitState(count, *moments)

    return optax.GradientTransformation(init, update)


def _in_chunks(moved: Callable, rows: int, *leaves: jax.Array) -> tuple[jax.Array, ...]:
    """moved(rows, 0, *leaves); of large leaves a part at a time, so that what it computes in float32 stays small.

    leaves: shaped as the weights, or with one number per block.
    """
    shape = leaves[0].shape
    n_rows, size = math.prod(shape[:rows]), math.prod(shape[rows:])
    blocks = size // BLOCK_8BIT
    if n_rows * size <= CHUNK_8BIT or size % BLOCK_8BIT:
        return moved(rows, 0, *leaves)
    parts = next(parts for parts in range(-(-size // CHUNK_8BIT), blocks + 1) if blocks % parts == 0)
    starts = jnp.tile(jnp.arange(parts, dtype=jnp.uint32) * jnp.uint32(size // parts), n_rows)
    cut = [leaf.reshape(n_rows * parts, -1) for leaf in leaves]
    made = jax.lax.map(lambda part: moved(0, *part), (starts, *cut))
    return tuple(x.reshape(leaf.shape) for x, leaf in zip(made, leaves, strict=True))


def _rows(path) -> int:
    """How many axes of a leaf, 0 or 1, no block reaches over."""
    return int(any(getattr(entry, "key", None) == STACKED for entry in path))


def _unzip(found: Tree, like: Tree) -> list[Tree]:
    """The trees of the first, second, .. entries of a tree of tuples that is shaped as `like`."""
    structure = jax.tree.structure(like)
    entries = structure.flatten_up_to(found)
    return [structure.unflatten(column) for column in zip(*entries, strict=True)]


def _in_blocks(x: jax.Array, rows: int) -> jax.Array:
    """(..., blocks, 256) with the first `rows` axes of x in front; the last block is filled up with zeros."""
    flat = x.reshape(*x.shape[:rows], -1)
    flat = jnp.pad(flat, [(0, 0)] * rows + [(0, -flat.shape[-1] % BLOCK_8BIT)])
    return flat.reshape(*x.shape[:rows], -1, BLOCK_8BIT)


def _encode(
    x: jax.Array, dtype: Any, rows: int, count: jax.Array | int, start: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """(codes in `dtype`, shaped as x; the largest magnitude of each block, float32, NaN where one is not finite).

    x = top * (code / largest code)^2 with the sign of the code: squares put most codes near zero. Of the two codes that
    x lies between it gets one or the other in turns over the steps (`_thresholds`), so that in the mean x is exact. To
    the nearest code instead, a momentum that no gradient feeds would stay what it is below a 200th of the top, and a
    second moment with a decay of 0.999 everywhere, because a step changes it by less than half a code.

    What is not 0 and has no sign has at least the code 2, the share of the top that m has at code 1: where the root of
    v was rounded to 0 beside an m that was not, the step would be far too large; so it is rather too small.
    """
    tops = largest(_in_blocks(x, rows), axis=-1)
    most = jnp.iinfo(dtype).max
    squares = most**2 * jnp.abs(x) / _spread(jnp.where(tops > 0, tops, 1.0), x.shape, rows)
    below = jnp.floor(jnp.sqrt(squares))
    above = (squares - below**2) / (2 * below + 1) > _thresholds(x.shape, rows, count, start)
    codes = jnp.minimum(below + above, most) * jnp.sign(x)
    if dtype == jnp.uint8:
        codes = jnp.where(x > 0, jnp.maximum(codes, 2.0), 0.0)
    return codes.astype(dtype), tops


def _thresholds(shape: tuple[int, ...], rows: int, count: jax.Array | int, start: jax.Array | int) -> jax.Array:
    """For each number of a leaf a share from 0 to below 1 that takes all values evenly over steps and over places.

    The fractional part of a * place + b * count (the sequence R2 of Roberts 2018), in 32-bit integers that wrap around.
    Rows have the same, so that it does not matter where a leaf is cut. start: the place of the first number.
    """
    places = jnp.asarray(start, jnp.uint32) + jax.lax.iota(jnp.uint32, math.prod(shape[rows:])).reshape(shape[rows:])
    turns = places * jnp.uint32(3242174889) + jnp.asarray(count, jnp.uint32) * jnp.uint32(2447445414)
    return jnp.broadcast_to((turns >> 8).astype(jnp.float32) * 2.0**-24, shape)


def _decode(codes: jax.Array, tops: jax.Array, rows: int) -> jax.Array:
    shares = codes.astype(jnp.float32) / jnp.iinfo(codes.dtype).max
    return shares * jnp.abs(shares) * _spread(tops, codes.shape, rows)


def _spread(tops: jax.Array, shape: tuple[int, ...], rows: int) -> jax.Array:
    """To each number of a leaf of this shape the largest of its block."""
    flat = jnp.repeat(tops, BLOCK_8BIT, axis=-1)[..., : math.prod(shape[rows:])]
    return flat.reshape(shape)


def learning_rate(cfg: OptimizerConfig, steps: int, step: int) -> np.float32:
    """The learning rate of one step of a phase of so many steps.

    constant: warm-up, then lr. cosine and linear: warm-up, then down to final_lr * lr. wsd: warm-up, stable, and over
    the last `decay` share of the phase down linearly (Hu et al. 2024, MiniCPM).
    """
    warmup = round(cfg.warmup * steps)
    after, rest = max(step - warmup, 0), max(steps - warmup, 1)
    if cfg.schedule == "constant":
        rate = np.float32(cfg.lr)
    elif cfg.schedule == "cosine":
        angle = _share(np.float32(np.pi) * np.float32(min(after, rest)), rest)
        half = np.float32(0.5) * (np.float32(1) + np.float32(math.cos(angle)))
        rate = np.float32(cfg.lr) * (np.float32(1 - cfg.final_lr) * half + np.float32(cfg.final_lr))
    else:
        down = rest if cfg.schedule == "linear" else max(round(cfg.decay * steps), 1)
        left = np.float32(1) - _share(np.float32(min(max(after - max(rest - down, 0), 0), down)), down)
        end = cfg.lr * cfg.final_lr
        rate = np.float32(cfg.lr - end) * left + np.float32(end)
    # The warm-up is shifted by one so that the first step already moves.
    ramp = min((step + 1) / warmup, 1.0) if warmup else 1.0
    return np.float32(ramp * float(rate))


def _share(part: np.float32, whole: int) -> np.float32:
    """part / whole, rounded as XLA rounds it: it multiplies by the reciprocal."""
    return part * (np.float32(1) / np.float32(whole))
