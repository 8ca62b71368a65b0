"""Optimizers and schedules: what is decayed, clipped, orthogonalised and kept, and that each of them learns.

Legend: L blocks, S singular values, N numbers.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import leaves, same_bits, step_parts, tiny

from stackwise_jax.config.schema import OptimizerConfig
from stackwise_jax.engine import optimizer as optimizer_module
from stackwise_jax.engine.carry import item_state, join_state
from stackwise_jax.engine.optimizer import make_optimizer
from stackwise_jax.engine.resident import initial_state
from stackwise_jax.engine.update import clip, norm

NAMES = ["adamw", "sgd", "lion", "adafactor", "muon", "adamw8bit"]
RATES = {"adamw": 1e-2, "sgd": 0.3, "lion": 2e-3, "adafactor": 2e-2, "muon": 1e-2, "adamw8bit": 1e-2}


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
    return optimizer.update(clip(cfg, grads, norm(grads)), optimizer.init(params), params)[0]


@functools.cache
def tiny_losses(name: str, *changes: str) -> tuple[float, ...]:
    """Of 40 steps on one batch."""
    settings = (f"optimizer.name={name}", f"optimizer.lr={RATES[name]}", *changes)
    parts = step_parts(tiny("model.architecture.n_stacks=1", *settings))
    step, state, losses = parts.compiled(), parts.state(), []
    for _ in range(40):
        state, metrics = step(state, parts.frozen, parts.data, parts.constants)
        losses.append(float(metrics["loss"]))
    return tuple(losses)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_the_loss(name):
    losses = tiny_losses(name)
    assert losses[0] > 5
    assert np.mean(losses[-5:]) < losses[0] - 1.5


@pytest.mark.parametrize("name", NAMES)
def test_weights_decay_on_matrices_only_and_apart_from_momentum(name):
    params = learning_tree()
    zeros = jax.tree.map(jnp.zeros_like, params)
    for decay in (0.0, 0.1):
        optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=decay))
        state, step = optimizer.init(params), jax.jit(optimizer.update)
        for _ in range(2):
            moved, state = step(zeros, state, params)
            for path, values in leaves(params).items():
                expected = -decay * values if path.endswith("['kernel']") else np.zeros_like(values)
                np.testing.assert_allclose(leaves(moved)[path], expected, rtol=1e-6, atol=1e-7, err_msg=path)


def test_gradients_are_clipped_to_their_global_norm():
    params = learning_tree()
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
    moments = {"adamw": 2, "lion": 1, "sgd": 1, "muon": 1, "adafactor": 0, "adamw8bit": 2}[name]
    size = sum(values.size for values in learned.values())
    held = sum(values.size for values in kept.values())
    if name == "muon":  # Adam keeps a second moment for the head and the norms
        size = sum(v.size * (1 if "stacks" in k and k.endswith("['kernel']") else 2) for k, v in learned.items())
    if name == "adamw8bit":  # two scales for each block of 256 numbers
        held -= sum(values.size for path, values in kept.items() if "_tops" in path)
    if name != "adafactor":
        assert moments * size <= held <= moments * size + 10
    assert held < 2.1 * size


def same_inputs(name: str, grads_per_step, params, **changes):
    """The updates and the last state of an optimizer that is fed these gradients."""
    optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=0.0, **changes))
    state, step, moved = optimizer.init(params), jax.jit(optimizer.update), []
    for grads in grads_per_step:
        updates, state = step(grads, state, params)
        moved.append(updates)
    return moved, state


def test_8_bit_adam_moves_as_adam_does_where_gradients_are_very_unlike():
    """In each block of 256 numbers gradients span ten orders of magnitude, and some are 0."""
    sizes_N = np.random.default_rng(0).permutation(np.r_[10.0 ** -np.linspace(0, 10, 500), np.zeros(12)])
    noise_SN = 1 + 0.5 * np.random.default_rng(1).normal(size=(60, 512))
    grads = [{"head": {"kernel": (sizes_N * noise_N).astype(np.float32)}} for noise_N in noise_SN]
    exact_SN, packed_SN = (
        np.stack([tree["head"]["kernel"] for tree in same_inputs(name, grads, grads[0], eps=1e-20)[0]])
        for name in ("adamw", "adamw8bit")
    )
    assert (packed_SN[:, sizes_N == 0] == 0).all()
    assert np.abs(exact_SN).max() < 1.1 and np.abs(packed_SN).max() < 4  # nothing blows up
    way_N, expected_N = packed_SN.mean(axis=0), exact_SN.mean(axis=0)
    for least, bound in ((1e-1, 0.02), (1e-2, 0.02), (1e-3, 0.03), (1e-4, 0.1)):
        group = (sizes_N >= least) & (sizes_N < 10 * least)
        assert way_N[group].mean() == pytest.approx(expected_N[group].mean(), rel=bound), least
    assert (np.abs(way_N) < 1.3).all()  # what is smaller goes slower, never faster


def test_8_bit_moments_do_not_stand_still():
    """Half of a block gets no gradient any more, the other half ever larger ones: m and v follow, over many steps."""
    n, ones_N = 1000, np.ones(256, np.float32)
    grads = [{"head": {"kernel": ones_N}}, {"head": {"kernel": np.r_[ones_N[:128], 0 * ones_N[128:]]}}]
    optimizer = {name: make_optimizer(OptimizerConfig(name=name, weight_decay=0.0, b2=0.999)) for name in NAMES}

    @functools.partial(jax.jit, static_argnames="name")
    def after(name: str, kernel_N):
        step = lambda i, state: optimizer[name].update(
            {"head": {"kernel": jnp.where(i < 5, ones_N, kernel_N)}}, state, grads[0]
        )[1]
        state = jax.lax.fori_loop(0, n, step, optimizer[name].init(grads[0]))
        return optimizer[name].update({"head": {"kernel": kernel_N}}, state, grads[0])[0]["head"]["kernel"]

    exact_N, packed_N = (after(name, grads[1]["head"]["kernel"]) for name in ("adamw", "adamw8bit"))
    np.testing.assert_allclose(packed_N[:128], exact_N[:128], rtol=0.03)
    assert np.abs(packed_N[128:]).max() < 0.05


def test_state_of_8_bit_adam_takes_two_bytes_per_weight():
    params = {"stacks": ({"blocks": {"q": {"kernel": jnp.zeros((3, 64, 48), jnp.bfloat16)}}},)}
    state = jax.eval_shape(make_optimizer(OptimizerConfig(name="adamw8bit")).init, params)
    n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert n_bytes == 3 * 64 * 48 * (2 + 8 / 256) + 4
    assert sorted(str(leaf.dtype) for leaf in jax.tree.leaves(state)) == [
        "float32",
        "float32",
        "int32",
        "int8",
        "uint8",
    ]


def test_8_bit_adam_takes_large_leaves_in_parts_without_changing_a_bit(monkeypatch):
    params = {
        "stacks": (
            {"blocks": {"attn": {"q": {"kernel": jnp.ones((3, 64, 96))}}, "norm": {"scale": jnp.ones((3, 7))}}},
        ),
        "head": {"kernel": jnp.ones((64, 128))},
    }
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)

    def after_three() -> tuple:
        optimizer = make_optimizer(OptimizerConfig(name="adamw8bit"))
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for i in range(3):
            updates, state = update(jax.tree.map(lambda g, i=i: g * (1 + i), grads), state, params)
        return updates, state

    whole = after_three()
    monkeypatch.setattr(optimizer_module, "CHUNK_8BIT", 1000)
    assert same_bits(after_three(), whole)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
def test_8_bit_state_shows_what_is_not_finite(bad, dtype):
    """In its whole block, and in no other; there are many, so that XLA's maximum passes over NaN."""
    x_BN = np.abs(np.random.default_rng(0).standard_normal((8, 4, 256))).astype(np.float32)
    x_BN[3, 2, 100] = bad
    codes, tops = jax.jit(lambda x: optimizer_module._encode(x, dtype, 1, 0, 0))(x_BN)
    found_BN = np.asarray(optimizer_module._decode(codes, tops, 1))
    expected_BN = np.zeros(x_BN.shape, bool)
    expected_BN[3, 2] = True
    np.testing.assert_array_equal(np.isnan(found_BN), expected_BN)


def test_state_of_8_bit_adam_is_cut_and_joined_by_stack():
    """Rows of unlike stacks share no scale: a merged group has the state that its stacks have alone."""
    grads = [
        {"q": {"kernel": 10.0**k * jax.random.normal(jax.random.key(k), (n, 10, 7))}} for k, n in enumerate((1, 3))
    ]
    trees = [{"stacks": ({"blocks": tree},)} for tree in grads]
    merged = jax.tree.map(lambda *parts: jnp.concatenate(parts), *trees)
    layout = (((0, 1), (1, 3)),)
    whole = same_inputs("adamw8bit", [merged, merged], merged)[1]
    fresh = make_optimizer(OptimizerConfig(name="adamw8bit")).init(merged)
    items = {f"stacks/{k:03d}": item_state(whole, layout, f"stacks/{k:03d}") for k in (0, 1)}
    assert same_bits(join_state(fresh, layout, items), whole)
    for k, tree in enumerate(trees):
        alone = same_inputs("adamw8bit", [tree, tree], tree)[1]
        own = item_state(alone, (((k,), (len(grads[k]["q"]["kernel"]),)),), f"stacks/{k:03d}")
        assert len(own) == 5 and same_bits(own, items[f"stacks/{k:03d}"])


@pytest.mark.parametrize(
    ("bound", "name", "changes"),
    [
        (0.005, "adamw8bit", ()),
        (0.003, "adamw", ("optimizer.state_dtype=bf16",)),
    ],
    ids=["8 bit", "bf16 momentum"],
)
def test_small_state_learns_as_adamw_does(bound, name, changes):
    """All the way down from 5.6 nats to 0.006 with adamw, so many nats apart at most."""
    losses, expected = tiny_losses(name, *changes), tiny_losses("adamw")
    apart = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    assert 0 < apart < bound


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon"])
@pytest.mark.parametrize("weights", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("state_dtype", [None, "fp32", "bf16"])
def test_momentum_has_the_dtype_that_was_asked_for_and_second_moments_are_float32(name, weights, state_dtype):
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, weights), learning_tree())
    optimizer = make_optimizer(OptimizerConfig(name=name, state_dtype=state_dtype))
    state = jax.eval_shape(optimizer.init, params)
    updates, new = jax.eval_shape(optimizer.update, params, state, params)
    assert [x.dtype for x in jax.tree.leaves(new)] == [x.dtype for x in jax.tree.leaves(state)]  # no step recompiles
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
    momentum = {None: weights, "fp32": jnp.float32, "bf16": jnp.bfloat16}[state_dtype]
    kinds: dict[str, set] = {"momentum": set(), "second": set()}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        names = {getattr(entry, "name", None) for entry in path}
        if names & {"mu", "trace"}:
            kinds["momentum"].add(leaf.dtype)
        elif "nu" in names:
            kinds["second"].add(leaf.dtype)
    assert kinds["momentum"] == {jnp.dtype(momentum)}
    assert kinds["second"] == ({jnp.dtype(jnp.float32)} if name in ("adamw", "muon") else set())


def test_second_moment_of_bf16_weights_does_not_stand_still():
    params = {"head": {"kernel": jnp.ones(8, jnp.bfloat16)}}
    optimizer = make_optimizer(OptimizerConfig(b2=0.999))
    state = jax.lax.fori_loop(0, 2000, lambda _, s: optimizer.update(params, s, params)[1], optimizer.init(params))
    (nu,) = (x for path, x in leaves(state).items() if ".nu" in path)
    np.testing.assert_allclose(nu, 1 - 0.999**2000, rtol=1e-3)  # kept in bf16 it stops below a half
