"""What turns gradients into new weights: clipping per stack, rounding of bf16 weights, and what is refused.

Legend: L blocks, N numbers.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import leaves, same_bits, step_parts, tiny

from stackwise_jax.config import validate
from stackwise_jax.config.schema import OptimizerConfig
from stackwise_jax.engine.optimizer import make_optimizer
from stackwise_jax.engine.update import apply_update, clip, norm, round_stochastically, stack_norms
from stackwise_jax.errors import UsageError

BF16 = "model.param_dtype=bf16"
THREE_STACKS = ("curriculum.plan=rackwise", "model.architecture.n_stacks=3", "model.architecture.blocks_per_stack=2")


def gradients(seed: int, n_blocks: int, size: float) -> dict:
    """Of a stack with two leaves, with a norm that grows with `size`."""
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: (size * rng.normal(size=(n_blocks, *shape))).astype(np.float32)
    return {"blocks": {"q": {"kernel": leaf(8, 4)}, "norm": {"scale": leaf(8)}}}


def norm_of(tree) -> float:
    return float(np.sqrt(sum(np.square(values, dtype=np.float64).sum() for values in leaves(tree).values())))


def clipped_by_stack(cfg: OptimizerConfig, grads, stack_sizes):
    return jax.jit(lambda grads: clip(cfg, grads, stack_norms(grads, stack_sizes)))(grads)


def test_each_stack_of_a_merged_group_is_clipped_by_its_own_norm():
    sizes = (1, 3, 2)
    stacks = [gradients(seed, n, size) for seed, (n, size) in enumerate(zip(sizes, (1.0, 1e-3, 30.0), strict=True))]
    alone = gradients(7, 2, 5.0)
    ends = {
        "embed": {"embedding": np.full((4, 4), 3, np.float32)},
        "head": {"kernel": np.full((4, 4), 0.1, np.float32)},
    }
    merged = jax.tree.map(lambda *parts: np.concatenate(parts), *stacks)
    grads = ends | {"stacks": (merged, alone, {})}
    clipped = clipped_by_stack(OptimizerConfig(clip="stack", grad_clip=0.5), grads, (sizes, (2,), (1, 1)))
    rows = (slice(0, 1), slice(1, 4), slice(4, 6))
    group = jax.device_get(clipped["stacks"][0])
    found = [jax.tree.map(lambda g, part=part: g[part], group) for part in rows]
    assert [norm_of(tree) < 0.5 for tree in stacks] == [False, True, False]
    for tree, original in zip([*found, clipped["stacks"][1]], [*stacks, alone], strict=True):
        factor = min(1.0, 0.5 / norm_of(original))
        for path, values in leaves(original).items():
            np.testing.assert_allclose(leaves(tree)[path], values * factor, rtol=1e-5, err_msg=path)
    assert norm_of(clipped["embed"]) == pytest.approx(0.5) and same_bits(clipped["head"], ends["head"])


def test_one_stack_alone_is_clipped_alike_either_way():
    grads = {"stacks": (gradients(0, 3, 4.0),)}
    cfg = OptimizerConfig(grad_clip=0.7)
    whole = jax.jit(lambda grads: clip(cfg, grads, norm(grads)))(grads)
    assert same_bits(whole, clipped_by_stack(cfg, grads, ((3,),))) and norm_of(whole) == pytest.approx(0.7)
    off = dataclasses.replace(cfg, grad_clip=0.0)
    assert clip(off, grads, norm(grads)) is grads


def test_the_step_clips_per_stack():
    changes = ("name=sgd", "b1=0", "weight_decay=0", "grad_clip=0.01", "clip=stack", "lr=1")
    parts = step_parts(tiny(*THREE_STACKS, *(f"optimizer.{change}" for change in changes)))
    assert parts.spec.stack_sizes == ((2, 2, 2),)
    state, _ = parts.compiled()(parts.state(), parts.frozen, parts.data, parts.constants)
    moved = jax.tree.map(np.subtract, *jax.device_get((state.learning, parts.learning)))
    (group,) = moved["stacks"]
    stacks = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], group) for i in range(3)]
    # Float32 weights near 1 cannot follow a step of 0.01 over their thousands of numbers more exactly.
    norms = [norm_of(tree) for tree in (moved["embed"], *stacks, moved["head"])]
    np.testing.assert_allclose(norms, 0.01, rtol=1e-3)
    assert step_parts(tiny()).spec.stack_sizes is None  # the norm of the whole does not ask for stacks


def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour():
    values_N = np.array([1.001, -1.001, 1.0, 3.1415927, -2.5e-20, 1e-3, 0.0, 255.3], np.float32)
    x_RN = jnp.broadcast_to(jnp.asarray(values_N), (20_000, 8))
    rounded_RN = round_stochastically(x_RN, jnp.bfloat16, jax.random.key(0))
    assert rounded_RN.dtype == jnp.bfloat16
    found_RN = np.asarray(rounded_RN, np.float64)
    for value, found_R in zip(values_N, found_RN.T, strict=True):
        ulp = float(jnp.finfo(jnp.bfloat16).eps) * 2.0 ** np.floor(np.log2(abs(value))) if value else 0.0
        assert np.abs(found_R - value).max() <= ulp
        assert abs(found_R.mean() - value) <= 0.02 * ulp  # of one draw half a ulp; of 20,000 four standard deviations
    assert (found_RN[:, 2] == 1).all() and (found_RN[:, 6] == 0).all()  # what bf16 can hold stays
    assert len(np.unique(found_RN[:, 0])) == 2
    again = round_stochastically(x_RN, jnp.bfloat16, jax.random.key(0))
    assert same_bits(rounded_RN, again)
    assert not same_bits(rounded_RN, round_stochastically(x_RN, jnp.bfloat16, jax.random.key(1)))
    assert same_bits(round_stochastically(x_RN, jnp.float32, jax.random.key(0)), x_RN)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000])
def test_stochastic_rounding_makes_no_number_of_what_is_none(bits):
    """The largest NaN and random bits add up to zero."""
    x_N = np.full(1000, bits, np.uint32).view(np.float32)
    rounded_N = round_stochastically(jnp.asarray(x_N), jnp.bfloat16, jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(rounded_N, np.float32), x_N)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_adapters_and_nothing_else_move_at_their_own_rate(rounding):
    """Without momentum and decay a weight moves by learning rate times gradient."""
    one = lambda: jnp.ones((4, 4), jnp.float32)
    adapter = {"adapters": {"trunk": {"a": one(), "b": one()}}}
    learning = {
        "embed": {"embedding": one()},
        "stacks": ({"blocks": {"q": {"kernel": one()}}}, {"blocks": {"q": adapter}}),
        "head": {"kernel": one()},
    }
    cfg = OptimizerConfig(name="sgd", b1=0.0, weight_decay=0.0, rounding=rounding)
    opt, key = make_optimizer(cfg).init(learning), jax.random.key(0)
    moved, _, finite = apply_update(cfg, 3.0, learning, opt, learning, jnp.float32(0.125), key, jnp.bool_(True))
    assert finite
    for path, values in leaves(moved).items():
        assert (values == (1 - 0.375 if "adapters" in path else 1 - 0.125)).all(), path


def test_small_updates_reach_bf16_weights_only_with_stochastic_rounding():
    learning = {"head": {"kernel": jnp.ones((64, 64), jnp.bfloat16)}}
    grads = jax.tree.map(jnp.ones_like, learning)
    for rounding, expected in (("nearest", 1.0), ("stochastic", 1 - 100 * 1e-4)):
        cfg = OptimizerConfig(name="sgd", b1=0.0, weight_decay=0.0, rounding=rounding)
        tree, opt = learning, make_optimizer(cfg).init(learning)
        lr = jnp.float32(1e-4)
        move = jax.jit(
            lambda tree, opt, key, cfg=cfg, lr=lr: apply_update(cfg, 1.0, tree, opt, grads, lr, key, jnp.bool_(True))
        )
        for i in range(100):
            tree, opt, finite = move(tree, opt, jax.random.fold_in(jax.random.key(3), i))
            assert finite
        kernel = tree["head"]["kernel"]
        assert kernel.dtype == jnp.bfloat16
        assert float(kernel.astype(jnp.float32).mean()) == pytest.approx(expected, abs=4e-4)


def test_leaves_are_rounded_by_bits_of_their_own():
    learning = {name: {"kernel": jnp.ones((32, 32), jnp.bfloat16)} for name in ("embed", "head")}
    cfg = OptimizerConfig(name="sgd", b1=0.0, weight_decay=0.0, rounding="stochastic")
    opt = make_optimizer(cfg).init(learning)
    fine = jnp.bool_(True)
    moved, _, _ = apply_update(cfg, 1.0, learning, opt, learning, jnp.float32(1e-3), jax.random.key(0), fine)
    assert not same_bits(moved["embed"], moved["head"])


@pytest.mark.parametrize("fine", [True, False])
def test_what_is_not_finite_does_not_reach_the_weights(fine):
    """Adam without eps divides 0 by 0 where a gradient is 0."""
    learning = {"head": {"kernel": jnp.ones((2, 3))}}
    grads = {"head": {"kernel": jnp.array([[1.0, 0.0, -1.0], [0.0, 2.0, 3.0]])}}
    cfg = OptimizerConfig(eps=0.0, weight_decay=0.0)
    opt = make_optimizer(cfg).init(learning)
    new, new_opt, finite = apply_update(cfg, 1.0, learning, opt, grads, jnp.float32(0.1), None, jnp.bool_(fine))
    assert not finite
    if fine:
        still = np.asarray(grads["head"]["kernel"]) == 0
        assert (np.asarray(new["head"]["kernel"] == 1) == still).all() and not same_bits(new_opt, opt)
    else:
        assert same_bits(new, learning) and same_bits(new_opt, opt)


def test_stochastic_rounding_goes_on_to_the_same_bits_from_what_is_saved():
    parts = step_parts(
        tiny(BF16, "optimizer.rounding=stochastic", "optimizer.name=adamw8bit", "curriculum.plan=append")
    )
    step, state = parts.compiled(), parts.state()
    run = lambda state: step(state, parts.frozen, parts.data, parts.constants)[0]
    for _ in range(2):
        state = run(state)
    saved = jax.device_get(state)
    continued = lambda at: parts.placement.put(
        saved._replace(step=np.int32(at)), jax.tree.map(lambda x: x.sharding, parts.state())
    )
    last = jax.device_get(run(state))
    assert same_bits(run(continued(2)), last)
    other = run(continued(3))  # the bits are those of the step
    assert same_bits(other.opt, last.opt) and not same_bits(other.learning, last.learning)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("optimizer.rounding=stochastic", r"optimizer.rounding is \"stochastic\"; write nearest, or model.param_dtype"),
        ("optimizer.name=adafactor optimizer.state_dtype=bf16", 'optimizer.state_dtype is "bf16"; write null, since'),
        ("optimizer.name=adamw8bit optimizer.state_dtype=fp32", 'optimizer.state_dtype is "fp32"; write null, since'),
    ],
)
def test_settings_that_do_nothing_are_refused(changes, said):
    with pytest.raises(UsageError, match=said):
        validate(tiny(*changes.split()))
    validate(tiny(BF16, *changes.split()[:1], *(["optimizer.rounding=nearest"] if "name" in changes else [])))
