"""The formula for FLOPs against what XLA counts for the same model written in plain jnp.

Shapes: B batch, T and S sequence, D d_model, H heads, K kv heads, V vocabulary, R rank of adapters. Loops over blocks
are unrolled, because XLA counts the body of a scan once.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from stackwise_jax.memory import (
    AttentionDims,
    BlockDims,
    StackDims,
    StepDims,
    block_forward_flops,
    head_forward_flops,
    phase_flops,
    step_flops,
)

B, T, D, F, V, R = 2, 64, 128, 384, 512, 16
GQA = BlockDims(d_model=D, d_ff=F, n_heads=4, n_kv_heads=2)
FIXED_UP = BlockDims(d_model=D, d_ff=F, n_heads=4, n_kv_heads=4, freeze_up_proj=True)


def shapes_of(dims):
    d_kv = dims.d_model // dims.n_heads * dims.n_kv_heads
    return dict(q=(D, D), k=(D, d_kv), v=(D, d_kv), o=(D, D), gate=(D, F), up=(D, F), down=(F, D))


def adapted(*blocks):
    """The blocks with an adapter of rank R on each matrix."""
    entries = lambda dims: R * sum(sum(shape) for shape in shapes_of(dims).values())
    return tuple(dataclasses.replace(dims, adapter_entries=entries(dims)) for dims in blocks)


def adapter_params(dims):
    if not dims.adapter_entries:
        return {}
    pairs = {name: (jnp.zeros((n_in, R)), jnp.zeros((R, n_out))) for name, (n_in, n_out) in shapes_of(dims).items()}
    return {"adapters": pairs}


def block_params(dims):
    shapes = shapes_of(dims)
    return {name: jnp.zeros(shape) for name, shape in shapes.items()} | {"norm1": jnp.ones(D), "norm2": jnp.ones(D)}


def norm(x_BTD, scale):
    return x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD**2, -1, keepdims=True) + 1e-6) * scale


def block(dims, p, x_BTD):
    def product(x_BTI, name):
        y_BTO = x_BTI @ p[name]
        if "adapters" in p:
            a_IR, b_RO = p["adapters"][name]
            y_BTO = y_BTO + x_BTI @ a_IR @ b_RO
        return y_BTO

    h_BTD, n, shape = norm(x_BTD, p["norm1"]), dims.n_heads // dims.n_kv_heads, x_BTD.shape
    q_BTKnh = product(h_BTD, "q").reshape(*shape[:2], dims.n_kv_heads, n, -1)
    k_BSKh, v_BSKh = (product(h_BTD, name).reshape(*shape[:2], dims.n_kv_heads, -1) for name in "kv")
    weights = jax.nn.softmax(jnp.einsum("BTKnh,BSKh->BKnTS", q_BTKnh, k_BSKh))
    x_BTD = x_BTD + product(jnp.einsum("BKnTS,BSKh->BTKnh", weights, v_BSKh).reshape(shape), "o")
    h_BTD = norm(x_BTD, p["norm2"])
    return x_BTD + product(jax.nn.silu(product(h_BTD, "gate")) * product(h_BTD, "up"), "down")


def counted(lowered_or_compiled):
    analysis = lowered_or_compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def gradient_of(step):
    """Loss and gradients of one step as the engine takes it, and its learning and fixed trees."""
    learning, fixed = {}, {"tokens": jnp.zeros((step.batch_size, step.seq_len), jnp.int32)}
    blocks = [(f"{i}.{j}", stack, dims) for i, stack in enumerate(step.path) for j, dims in enumerate(stack.blocks)]
    for name, stack, dims in blocks:
        p = block_params(dims)
        fixed[name + ".up"] = {"up": p.pop("up")} if dims.freeze_up_proj else {}
        (learning if stack.learns else fixed)[name] = p
        (learning if stack.adapters_learn else fixed)[name + ".adapters"] = adapter_params(dims)
    (learning if step.train_embed else fixed)["embed"] = jnp.zeros((V, D))
    head = {"norm": jnp.ones(D)} | ({} if step.tie_embeddings else {"kernel": jnp.zeros((D, V))})
    (learning if step.train_head else fixed)["head"] = head

    def loss(learning, fixed):
        p = learning | fixed
        x_BTD = p["embed"][p["tokens"]]
        for name, _, dims in blocks:
            apply = jax.checkpoint(block, static_argnums=0) if step.remat else block
            x_BTD = apply(dims, p[name] | p[name + ".up"] | p[name + ".adapters"], x_BTD)
        kernel_DV = p["embed"].T if step.tie_embeddings else p["head"]["kernel"]
        logits = norm(x_BTD[:, : step.predicted], p["head"]["norm"]) @ kernel_DV
        return -jax.nn.log_softmax(logits)[..., 0].mean()

    return jax.grad(loss), learning, fixed


def step_of(*path, **changes):
    return StepDims(path, **(dict(batch_size=B, seq_len=T, d_model=D, vocab_size=V) | changes))


LEARNS, FROZEN = StackDims((GQA, FIXED_UP), learns=True), StackDims((GQA, FIXED_UP))
ADAPTED = StackDims(adapted(GQA, FIXED_UP), adapters_learn=True)
RESTING = StackDims(adapted(GQA, FIXED_UP))  # adapters that do not learn
STEPS = {
    "rackwise": step_of(LEARNS, train_embed=True, train_head=True),
    "rackwise, tied": step_of(LEARNS, train_embed=True, train_head=True, tie_embeddings=True),
    "embedding alone, tied": step_of(FROZEN, train_embed=True, tie_embeddings=True),
    "frozen prefix": step_of(FROZEN, LEARNS, train_head=True),
    "frozen suffix": step_of(LEARNS, FROZEN, train_embed=True),
    "frozen prefix and suffix": step_of(FROZEN, LEARNS, FROZEN),
    "head alone": step_of(FROZEN, train_head=True),
    "adapters alone": step_of(ADAPTED, ADAPTED),
    "adapted trunk": step_of(ADAPTED, LEARNS, train_head=True),
    "adapters that do not learn": step_of(RESTING, LEARNS, RESTING),
    "weights learn beside fixed adapters": step_of(dataclasses.replace(RESTING, learns=True), train_head=True),
    "remat": step_of(LEARNS, train_embed=True, train_head=True, remat=True),
    "remat through a frozen suffix": step_of(LEARNS, FROZEN, remat=True),
    "remat with adapters": step_of(ADAPTED, ADAPTED, remat=True),
    "long sequences": step_of(LEARNS, FROZEN, seq_len=384),
    "few predictions": step_of(LEARNS, train_head=True, predicted=10),
}


@pytest.mark.parametrize("name", STEPS)
def test_step_flops_against_xla(name):
    gradient, learning, fixed = gradient_of(STEPS[name])
    lowered = jax.jit(gradient).lower(learning, fixed)  # compiling takes seconds and leaves the products as they are
    assert step_flops(STEPS[name])["total"] == pytest.approx(counted(lowered), rel=0.05)


@pytest.mark.parametrize("dims", [GQA, FIXED_UP])
def test_block_forward_against_xla(dims):
    x_BTD = jnp.zeros((B, T, D))
    xla = counted(jax.jit(block, static_argnums=0).lower(dims, block_params(dims), x_BTD).compile())
    assert B * T * dims.forward(T) == pytest.approx(xla, rel=0.05)
    assert block_forward_flops(D, F, dims.n_heads, dims.n_kv_heads, T) == dims.forward(T)


@pytest.mark.parametrize(("seq_len", "met"), [(10, 10), (64, 64), (65, 33), (128, 64), (130, 44), (193, 49)])
def test_linear_attention_meets_the_rows_of_a_chunk(seq_len, met):
    """As few chunks of at most 64 rows as there can be, all of one length."""
    dims = AttentionDims(weights=0, scored=1000, state=7, chunk=64)
    assert dims.products(seq_len) == 1000 * met + 7
    assert dataclasses.replace(dims, scans=2).products(seq_len) == 2 * (1000 * met + 7)
    assert dataclasses.replace(dims, chunk=None).products(seq_len) == 1000 * seq_len + 7


def test_known_numbers():
    """Two FLOPs per weight and token, four per attended position and width; the head two per entry."""
    dims = BlockDims(d_model=8, d_ff=16, n_heads=4, n_kv_heads=1)
    assert dims.forward(seq_len=10) == 2 * (8 * 8 * 2 + 8 * 2 * 2 + 3 * 8 * 16) + 4 * 10 * 8
    assert head_forward_flops(8, 100) == 1600


def flops_of(*path, steps=10, cached_batches=None, advanced_stacks=None, **changes):
    step = step_of(*path, **(dict(batch_size=4, train_head=True) | changes))
    return phase_flops(step, steps, cached_batches=cached_batches, advanced_stacks=advanced_stacks)


def test_a_cache_replaces_the_prefix():
    path = (FROZEN, RESTING, LEARNS)
    per_stack = [4 * T * sum(dims.forward(T) for dims in stack.blocks) for stack in path]
    fresh, filled = flops_of(*path), flops_of(*path, cached_batches=7)
    advanced = flops_of(*path, cached_batches=7, advanced_stacks=1)
    assert per_stack[1] > per_stack[0]
    assert (fresh["prefix_forward"], fresh["cache_fill"]) == (10 * sum(per_stack[:2]), 0)
    assert (filled["prefix_forward"], filled["cache_fill"]) == (0, 7 * sum(per_stack[:2]))
    assert (advanced["prefix_forward"], advanced["cache_fill"]) == (0, 7 * per_stack[1])
    assert flops_of(*path, cached_batches=7, advanced_stacks=0)["cache_fill"] == 0
    for flops in (fresh, filled, advanced):
        assert flops["total"] == sum(n for part, n in flops.items() if part != "total")
        assert all(isinstance(n, int) for n in flops.values())


def test_a_phase_is_so_many_steps():
    assert flops_of(FROZEN, LEARNS) == {
        name: 10 * n
        for name, n in (step_flops(step_of(FROZEN, LEARNS, batch_size=4, train_head=True)) | {"cache_fill": 0}).items()
    }


def test_only_what_learns_has_weight_gradients():
    frozen_after = flops_of(LEARNS, FROZEN)
    assert frozen_after["backward_weights"] == flops_of(LEARNS)["backward_weights"]
    assert frozen_after["backward_inputs"] == 2 * flops_of(LEARNS)["backward_inputs"]
    fixed, free = (StackDims((BlockDims(D, F, 4, 4, freeze_up_proj=f),), learns=True) for f in (True, False))
    saved = flops_of(free)["backward_weights"] - flops_of(fixed)["backward_weights"]
    assert saved == 10 * 4 * T * 2 * D * F
    entries = sum(dims.adapter_entries for dims in ADAPTED.blocks)
    assert flops_of(ADAPTED)["backward_weights"] == 10 * 4 * T * 2 * entries
    assert flops_of(RESTING, train_embed=True)["backward_weights"] == 0


def test_adapters_that_learn_end_the_prefix():
    assert flops_of(FROZEN, ADAPTED, FROZEN)["prefix_forward"] == flops_of(FROZEN, LEARNS)["prefix_forward"] > 0
    assert step_of(FROZEN, ADAPTED).first_learning == 1
    assert (step_of(FROZEN, RESTING).first_learning, step_of(FROZEN, train_embed=True).first_learning) == (2, 0)
