"""Optimizers and learning-rate schedules, all from optax.

The learning rate is not part of the optimizer: it is computed on the host once per phase and multiplies the update
inside the step as a traced scalar, so that phases of unlike length or rate share one compiled step.
"""

from __future__ import annotations

import jax
import numpy as np
import optax
from optax import contrib

from stackwise_jax.config.schema import OptimizerConfig


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

    Args:
        cfg: name, betas, weight decay (decoupled, on matrices only) and the global-norm clip.
    """
    decay = cfg.weight_decay
    if cfg.name == "adamw":
        rule = optax.adamw(1.0, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=decay, mask=decay_mask)
    elif cfg.name == "lion":
        rule = optax.lion(1.0, b1=cfg.b1, b2=cfg.b2, weight_decay=decay, mask=decay_mask)
    elif cfg.name == "adafactor":
        rule = optax.adafactor(1.0, weight_decay_rate=decay or None, weight_decay_mask=decay_mask)
    elif cfg.name == "sgd":
        rule = optax.chain(optax.sgd(1.0, momentum=cfg.b1 or None), optax.add_decayed_weights(-decay, mask=decay_mask))
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
        rule = optax.chain(muon, optax.add_decayed_weights(-decay, mask=decay_mask))
    if cfg.grad_clip > 0:
        return optax.chain(optax.clip_by_global_norm(cfg.grad_clip), rule)
    return rule


def learning_rates(cfg: OptimizerConfig, steps: int) -> np.ndarray:
    """The learning rate of each step of a phase, float32 (steps,).

    constant: warm-up, then lr. cosine and linear: warm-up, then down to final_lr * lr. wsd: warm-up, stable, and over
    the last `decay` share of the phase down linearly (Hu et al. 2024, MiniCPM).
    """
    warmup = round(cfg.warmup * steps)
    end, rest = cfg.lr * cfg.final_lr, max(steps - warmup, 1)
    if cfg.schedule == "constant":
        body = optax.constant_schedule(cfg.lr)
    elif cfg.schedule == "cosine":
        body = optax.cosine_decay_schedule(cfg.lr, rest, alpha=cfg.final_lr)
    elif cfg.schedule == "linear":
        body = optax.linear_schedule(cfg.lr, end, rest)
    else:
        down = round(cfg.decay * steps)
        body = optax.linear_schedule(cfg.lr, end, max(down, 1), transition_begin=max(rest - down, 0))
    # The warm-up is shifted by one so that the first step already moves.
    step = np.arange(steps)
    ramp = np.minimum((step + 1) / max(warmup, 1), 1.0) if warmup else np.ones(steps)
    after = np.asarray(jax.vmap(body)(np.maximum(step - warmup, 0)), np.float64)
    return (ramp * after).astype(np.float32)
