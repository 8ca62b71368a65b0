"""Optimizers and schedules: what is decayed, clipped, orthogonalised and kept, and that each of them learns."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import leaves, step_parts, tiny

from stackwise_jax.config.schema import OptimizerConfig
from stackwise_jax.engine.optimizer import learning_rates, make_optimizer
from stackwise_jax.engine.resident import initial_state

NAMES = ["adamw", "sgd", "lion", "adafactor", "muon"]
RATES = {"adamw": 1e-2, "sgd": 0.3, "lion": 2e-3, "adafactor": 2e-2, "muon": 1e-2}


def learning_tree() -> dict:
    """Every kind of leaf that a phase can learn; the stack has three blocks."""
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    block = {"attn": {"q": {"kernel": normal(0, 3, 16, 16)}}, "mlp": {"down": {"kernel": normal(1, 3, 48, 16)}}}
    return {
        "embed": {"embedding": normal(2, 64, 16)},
        "stacks": ({"blocks": block | {"attn_norm": {"scale": normal(3, 3, 16)}}},),
        "head": {"norm": {"scale": normal(4, 16)}, "kernel": normal(5, 16, 64)},
    }


def update(cfg: OptimizerConfig, grads, params):
    optimizer = make_optimizer(cfg)
    return optimizer.update(grads, optimizer.init(params), params)[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_the_loss(name):
    parts = step_parts(tiny("model.architecture.n_stacks=1", f"optimizer.name={name}", f"optimizer.lr={RATES[name]}"))
    step, state, losses = parts.compiled(), parts.state(), []
    for _ in range(40):
        state, metrics = step(state, parts.frozen, parts.data, parts.constants)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 5
    assert np.mean(losses[-5:]) < losses[0] - 1.5


@pytest.mark.parametrize("name", NAMES)
def test_weights_decay_on_matrices_only_and_apart_from_momentum(name):
    params = learning_tree()
    zeros = jax.tree.map(jnp.zeros_like, params)
    for decay in (0.0, 0.1):
        optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=decay))
        state = optimizer.init(params)
        for _ in range(2):
            moved, state = optimizer.update(zeros, state, params)
            for path, values in leaves(params).items():
                expected = -decay * values if path.endswith("['kernel']") else np.zeros_like(values)
                np.testing.assert_allclose(leaves(moved)[path], expected, rtol=1e-6, atol=1e-7, err_msg=path)


def test_gradients_are_clipped_to_their_global_norm():
    params = learning_tree()
    norm = lambda tree: float(jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree))))
    plain = OptimizerConfig(name="sgd", b1=0.0, weight_decay=0.0, grad_clip=0.5)
    clipped = update(plain, params, params)
    assert norm(params) > 10
    assert norm(clipped) == pytest.approx(0.5, rel=1e-5)
    ratio = leaves(jax.tree.map(lambda u, g: u / g, clipped, params))
    assert np.ptp([values.mean() for values in ratio.values()]) < 1e-6  # one factor for all leaves
    small = jax.tree.map(lambda x: x * 1e-3, params)
    for cfg, grads in ((plain, small), (dataclasses.replace(plain, grad_clip=0.0), params)):
        for path, values in leaves(update(cfg, grads, params)).items():
            np.testing.assert_allclose(values, -leaves(grads)[path], rtol=1e-6)


def test_muon_orthogonalises_each_block_of_a_stacked_matrix():
    params = learning_tree()
    grads = jax.tree.map(lambda x: x, params)
    kernels = grads["stacks"][0]["blocks"]
    for part in (kernels["attn"]["q"], kernels["mlp"]["down"]):
        part["kernel"] = part["kernel"] * jnp.array([1.0, 1e-3, 30.0])[:, None, None]
    cfg = OptimizerConfig(name="muon", weight_decay=0.0, grad_clip=0.0)
    moved = update(cfg, grads, params)["stacks"][0]["blocks"]
    for grad, step in ((kernels["attn"]["q"], moved["attn"]["q"]), (kernels["mlp"]["down"], moved["mlp"]["down"])):
        before_LS = np.linalg.svd(grad["kernel"], compute_uv=False)
        after_LS = np.linalg.svd(step["kernel"], compute_uv=False)
        assert (before_LS.max(axis=1) / before_LS.min(axis=1) > 2.5).all()
        # Five Newton-Schulz steps bring singular values between about 0.7 and 1.2 of one another.
        assert (after_LS.max(axis=1) / after_LS.min(axis=1) < 1.8).all()
        rms_L = np.sqrt((np.asarray(step["kernel"]) ** 2).mean(axis=(1, 2)))
        np.testing.assert_allclose(rms_L, 0.2, rtol=0.2)  # as large as Adam's, for every block alike


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_state_exists_only_for_what_learns(name):
    parts = step_parts(tiny("curriculum.plan=custom", f"optimizer.name={name}", "curriculum.phases=[{train: [0]}]"))
    state = initial_state(parts.spec, parts.placement, parts.learning)
    learned = leaves(parts.learning)
    shapes = {values.shape for values in learned.values()}
    frozen = {values.shape for values in leaves(parts.frozen).values()} - shapes
    assert (1, 32, 48) in {values.shape for values in leaves(parts.frozen).values()}  # the fixed up-projection
    assert not any("up" in path or "embed" in path for path in learned)
    kept = leaves(state.opt)
    assert not any("'up'" in path or "'embed'" in path for path in kept)
    assert not {values.shape for values in kept.values() if values.ndim > 1} & frozen
    moments = {"adamw": 2, "lion": 1, "sgd": 1, "muon": 1, "adafactor": 0}[name]
    size = sum(values.size for values in learned.values())
    held = sum(values.size for values in kept.values())
    if name == "muon":  # Adam keeps a second moment for the head and the norms
        size = sum(v.size * (1 if "stacks" in k and k.endswith("['kernel']") else 2) for k, v in learned.items())
    if name != "adafactor":
        assert moments * size <= held <= moments * size + 10
    assert held < 2.1 * size


def test_schedules_have_their_shapes():
    cfg = OptimizerConfig(lr=2.0, warmup=0.1, decay=0.3, final_lr=0.1)
    names = ("constant", "cosine", "linear", "wsd")
    rates = {name: learning_rates(dataclasses.replace(cfg, schedule=name), 100) for name in names}
    for name, rate in rates.items():
        assert rate.shape == (100,) and rate.dtype == np.float32
        np.testing.assert_allclose(rate[:10], 0.2 * np.arange(1, 11), rtol=1e-6, err_msg=name)  # the first step moves
        assert rate.max() == pytest.approx(2.0)
        assert (np.diff(rate[10:]) <= 1e-7).all()
    assert (rates["constant"][9:] == 2.0).all()
    for name in ("cosine", "linear", "wsd"):
        assert rates[name][-1] == pytest.approx(0.2, abs=0.07), name
    assert rates["linear"][55] == pytest.approx(1.1, abs=0.02)
    assert rates["cosine"][55] == pytest.approx(1.1, abs=0.02)
    assert rates["cosine"][20] > rates["linear"][20] + 0.1
    assert (rates["wsd"][9:70] == 2.0).all() and rates["wsd"][72] < 2.0
    assert rates["wsd"][85] == pytest.approx(1.1, abs=0.02)
    assert (learning_rates(OptimizerConfig(schedule="constant", warmup=0.0, lr=1e-3), 3) == np.float32(1e-3)).all()
    assert learning_rates(OptimizerConfig(), 1).tolist() == [np.float32(1e-3)]
