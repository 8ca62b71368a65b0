"""The formula for FLOPs against what XLA counts for the same model written in plain jnp.

Shapes: B batch, T and S sequence, D d_model, H heads, K kv heads, V vocabulary. Loops over blocks are unrolled, because
XLA counts the body of a scan once.
"""

import jax
import jax.numpy as jnp
import pytest

from stackwise_jax.memory import BlockDims, StackDims, block_forward_flops, head_forward_flops, phase_flops

B, T, D, F, V = 2, 64, 128, 384, 512
GQA = BlockDims(d_model=D, d_ff=F, n_heads=4, n_kv_heads=2)
FIXED_UP = BlockDims(d_model=D, d_ff=F, n_heads=4, n_kv_heads=4, freeze_up_proj=True)


def block_params(dims):
    d_kv = dims.d_model // dims.n_heads * dims.n_kv_heads
    shapes = dict(q=(D, D), k=(D, d_kv), v=(D, d_kv), o=(D, D), gate=(D, F), up=(D, F), down=(F, D))
    return {name: jnp.zeros(shape) for name, shape in shapes.items()} | {"norm1": jnp.ones(D), "norm2": jnp.ones(D)}


def norm(x_BTD, scale):
    return x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD**2, -1, keepdims=True) + 1e-6) * scale


def block(dims, p, x_BTD):
    h_BTD, n, shape = norm(x_BTD, p["norm1"]), dims.n_heads // dims.n_kv_heads, x_BTD.shape
    q_BTKnh = (h_BTD @ p["q"]).reshape(*shape[:2], dims.n_kv_heads, n, -1)
    k_BSKh, v_BSKh = ((h_BTD @ p[name]).reshape(*shape[:2], dims.n_kv_heads, -1) for name in "kv")
    weights = jax.nn.softmax(jnp.einsum("BTKnh,BSKh->BKnTS", q_BTKnh, k_BSKh))
    x_BTD = x_BTD + jnp.einsum("BKnTS,BSKh->BTKnh", weights, v_BSKh).reshape(shape) @ p["o"]
    h_BTD = norm(x_BTD, p["norm2"])
    return x_BTD + (jax.nn.silu(h_BTD @ p["gate"]) * (h_BTD @ p["up"])) @ p["down"]


def counted(lowered_or_compiled):
    analysis = lowered_or_compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def step(path, *, train_embed=False, train_head=False, tied=False, remat=False, predicted=None, seq_len=T):
    """Loss and gradients of one step as the engine takes it, and its learning and fixed trees."""
    learning, fixed = {}, {"tokens": jnp.zeros((B, seq_len), jnp.int32)}
    for i, stack in enumerate(path):
        for j, dims in enumerate(stack.blocks):
            p = block_params(dims)
            up = {"up": p.pop("up")} if dims.freeze_up_proj else {}
            (learning if stack.learns else fixed)[f"{i}.{j}"] = p
            fixed[f"{i}.{j}.up"] = up
    (learning if train_embed else fixed)["embed"] = jnp.zeros((V, D))
    head = {"norm": jnp.ones(D)} | ({} if tied else {"kernel": jnp.zeros((D, V))})
    (learning if train_head else fixed)["head"] = head

    def loss(learning, fixed):
        p = learning | fixed
        x_BTD = p["embed"][p["tokens"]]
        for i, stack in enumerate(path):
            for j, dims in enumerate(stack.blocks):
                apply = jax.checkpoint(block, static_argnums=0) if remat else block
                x_BTD = apply(dims, p[f"{i}.{j}"] | p[f"{i}.{j}.up"], x_BTD)
        kernel_DV = p["embed"].T if tied else p["head"]["kernel"]
        logits = norm(x_BTD[:, :predicted], p["head"]["norm"]) @ kernel_DV
        return -jax.nn.log_softmax(logits)[..., 0].mean()

    return jax.grad(loss), learning, fixed


LEARNS, FROZEN = StackDims((GQA, FIXED_UP), learns=True), StackDims((GQA, FIXED_UP))
PHASES = {
    "rackwise": ((LEARNS,), dict(train_embed=True, train_head=True)),
    "rackwise, tied": ((LEARNS,), dict(train_embed=True, train_head=True, tied=True)),
    "embedding alone, tied": ((FROZEN,), dict(train_embed=True, tied=True)),
    "frozen prefix": ((FROZEN, LEARNS), dict(train_head=True)),
    "frozen prefix and suffix": ((FROZEN, LEARNS, FROZEN), {}),
    "head alone": ((FROZEN,), dict(train_head=True)),
    "remat": ((LEARNS,), dict(train_embed=True, train_head=True, remat=True)),
    "remat through a frozen suffix": ((LEARNS, FROZEN), dict(remat=True)),
    "long sequences": ((LEARNS, FROZEN), dict(seq_len=384)),
    "few predictions": ((LEARNS,), dict(train_head=True, predicted=10)),
}


@pytest.mark.parametrize("name", PHASES)
def test_phase_flops_against_xla(name):
    path, options = PHASES[name]
    gradient, learning, fixed = step(path, **options)
    lowered = jax.jit(gradient).lower(learning, fixed)  # compiling takes seconds and leaves the products as they are
    flops = phase_flops(
        path,
        steps=1,
        batch_size=B,
        seq_len=options.get("seq_len", T),
        d_model=D,
        vocab_size=V,
        predicted=options.get("predicted"),
        train_embed=options.get("train_embed", False),
        train_head=options.get("train_head", False),
        tie_embeddings=options.get("tied", False),
        remat=options.get("remat", False),
    )
    assert flops["total"] == pytest.approx(counted(lowered), rel=0.05)


@pytest.mark.parametrize("dims", [GQA, FIXED_UP])
def test_block_forward_against_xla(dims):
    x_BTD = jnp.zeros((B, T, D))
    xla = counted(jax.jit(block, static_argnums=0).lower(dims, block_params(dims), x_BTD).compile())
    assert B * T * dims.forward(T) == pytest.approx(xla, rel=0.05)
    assert block_forward_flops(D, F, dims.n_heads, dims.n_kv_heads, T) == dims.forward(T)


def test_known_numbers():
    """Two FLOPs per weight and token, four per attended position and width; the head two per entry."""
    dims = BlockDims(d_model=8, d_ff=16, n_heads=4, n_kv_heads=1)
    assert dims.forward(seq_len=10) == 2 * (8 * 8 * 2 + 8 * 2 * 2 + 3 * 8 * 16) + 4 * 10 * 8
    assert head_forward_flops(8, 100) == 1600


def flops_of(path, **changes):
    usual = dict(steps=10, batch_size=4, seq_len=T, d_model=D, vocab_size=V, train_head=True)
    return phase_flops(path, **(usual | changes))


def test_a_cache_replaces_the_prefix():
    path = (FROZEN, FROZEN, LEARNS)
    per_batch = 4 * T * 2 * (GQA.forward(T) + FIXED_UP.forward(T))
    fresh, filled = flops_of(path), flops_of(path, cached_batches=7)
    advanced = flops_of(path, cached_batches=7, advanced_stacks=1)
    assert (fresh["prefix_forward"], fresh["cache_fill"]) == (10 * per_batch, 0)
    assert (filled["prefix_forward"], filled["cache_fill"]) == (0, 7 * per_batch)
    assert (advanced["prefix_forward"], advanced["cache_fill"]) == (0, 7 * per_batch // 2)
    assert flops_of(path, cached_batches=7, advanced_stacks=0)["cache_fill"] == 0
    for flops in (fresh, filled, advanced):
        assert flops["total"] == sum(n for part, n in flops.items() if part != "total")
        assert all(isinstance(n, int) for n in flops.values())


def test_one_step_is_a_tenth_of_ten():
    assert 10 * flops_of((LEARNS,), steps=1)["total"] == flops_of((LEARNS,))["total"]


def test_only_what_learns_has_weight_gradients():
    frozen_after = flops_of((LEARNS, FROZEN))
    assert frozen_after["backward_weights"] == flops_of((LEARNS,))["backward_weights"]
    assert frozen_after["backward_inputs"] == 2 * flops_of((LEARNS,))["backward_inputs"]
    fixed, free = (StackDims((BlockDims(D, F, 4, 4, freeze_up_proj=f),), learns=True) for f in (True, False))
    saved = flops_of((free,))["backward_weights"] - flops_of((fixed,))["backward_weights"]
    assert saved == 10 * 4 * T * 2 * D * F
