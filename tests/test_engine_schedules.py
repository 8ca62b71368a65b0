"""Learning-rate schedules: their shapes, and that each step has the rate that the schedules of optax give."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from stackwise_jax.config.schema import OptimizerConfig
from stackwise_jax.engine.optimizer import learning_rate

pytestmark = pytest.mark.optimized


def rates_of(cfg: OptimizerConfig, steps: int) -> np.ndarray:
    return np.array([learning_rate(cfg, steps, step) for step in range(steps)])


def test_schedules_have_their_shapes():
    cfg = OptimizerConfig(lr=2.0, warmup=0.1, decay=0.3, final_lr=0.1)
    names = ("constant", "cosine", "linear", "wsd")
    rates = {name: rates_of(dataclasses.replace(cfg, schedule=name), 100) for name in names}
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
    assert (rates_of(OptimizerConfig(schedule="constant", warmup=0.0, lr=1e-3), 3) == np.float32(1e-3)).all()
    assert rates_of(OptimizerConfig(), 1).tolist() == [np.float32(1e-3)]


def table_of_rates(cfg: OptimizerConfig, steps: int) -> np.ndarray:
    """The learning rates of a whole phase by the schedules of optax."""
    warmup, down = round(cfg.warmup * steps), round(cfg.decay * steps)
    end, rest = cfg.lr * cfg.final_lr, max(steps - warmup, 1)
    body = {
        "constant": lambda: optax.constant_schedule(cfg.lr),
        "cosine": lambda: optax.cosine_decay_schedule(cfg.lr, rest, alpha=cfg.final_lr),
        "linear": lambda: optax.linear_schedule(cfg.lr, end, rest),
        "wsd": lambda: optax.linear_schedule(cfg.lr, end, max(down, 1), transition_begin=max(rest - down, 0)),
    }[cfg.schedule]()
    step = np.arange(steps)
    ramp = np.minimum((step + 1) / max(warmup, 1), 1.0) if warmup else np.ones(steps)
    return (ramp * np.asarray(jax.vmap(body)(np.maximum(step - warmup, 0)), np.float64)).astype(np.float32)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 101, 997])
@pytest.mark.parametrize("shape", [(0.0, 0.3, 0.0), (0.05, 0.6, 0.1), (1.0, 0.0, 1.0), (0.013, 0.37, 0.37)])
def test_a_rate_is_that_of_the_table_of_optax(schedule, steps, shape):
    warmup, decay, final_lr = shape
    cfg = OptimizerConfig(schedule=schedule, lr=3.7e-3, warmup=warmup, decay=decay, final_lr=final_lr)
    rates, table = rates_of(cfg, steps), table_of_rates(cfg, steps)
    if schedule == "cosine":  # XLA's cosine is not rounded exactly, and 1 + cos magnifies that where it is near 0
        ulp = np.spacing(np.float32(cfg.lr))
        np.testing.assert_allclose(rates, table, rtol=0, atol=ulp)
    else:
        assert rates.tobytes() == table.tobytes()


def test_a_rate_needs_no_device(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", refuse)  # as under JAX_PLATFORMS=cuda
    assert 0 < learning_rate(OptimizerConfig(schedule="cosine"), 100, 50) < OptimizerConfig().lr


def test_a_rate_takes_no_longer_in_a_long_phase():
    cfg = OptimizerConfig(schedule="linear", warmup=0.1)
    assert learning_rate(cfg, 10**9, 10**8 - 1) == np.float32(cfg.lr)
    assert learning_rate(cfg, 10**9, 10**9 - 1) < 1e-8
