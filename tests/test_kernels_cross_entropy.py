"""Head and cross entropy: every implementation against the reference, in value, gradient and memory.

Legend: B batch, T sequence length, D d_model, V vocabulary (padded), k positions kept.
"""

import json
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.kernels.cross_entropy import gather_targets, linear_cross_entropy
from stackwise_jax.kernels.cross_entropy.chunked import default_chunk

B, T, D, V = 4, 20, 16, 48


def inputs(dtype=np.float32, kernel_dtype=np.float32, n_valid=V):
    rng = np.random.default_rng(0)
    x_BTD = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    kernel_DV = jnp.asarray(rng.normal(size=(D, V)) * 0.3, kernel_dtype)
    targets_BT = rng.integers(0, n_valid, (B, T))
    best_BT = (np.asarray(x_BTD, np.float32) @ np.asarray(kernel_DV, np.float32))[..., :n_valid].argmax(-1)
    targets_BT = jnp.asarray(np.where(rng.random((B, T)) < 0.3, best_BT, targets_BT), jnp.int32)
    weights_BT = jnp.asarray(rng.exponential(size=(B, T)) * (rng.random((B, T)) < 0.6), jnp.float32)
    return x_BTD, kernel_DV, targets_BT, weights_BT


@partial(jax.jit, static_argnames=("n_valid", "chunk", "train_kernel", "batch_shards", "implementation"))
def value_and_grads(x_BTD, kernel_DV, targets_BT, weights_BT, **options):
    """((mean nll, stats), (dx, dkernel)): the sum is scaled after the operation, as the training step does."""

    def loss(x_BTD, kernel_DV):
        total, stats = linear_cross_entropy(x_BTD, kernel_DV, targets_BT, weights_BT, **options)
        return total / weights_BT.sum(), stats

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_BTD, kernel_DV)


def test_reference_is_the_textbook_formula():
    x_BTD, kernel_DV, targets_BT, weights_BT = inputs()
    logits_BTV = np.asarray(x_BTD, np.float64) @ np.asarray(kernel_DV, np.float64)
    probs_BTV = np.exp(logits_BTV) / np.exp(logits_BTV).sum(-1, keepdims=True)
    nll_BT = -np.log(np.take_along_axis(probs_BTV, np.asarray(targets_BT)[..., None], -1)[..., 0])
    total, stats = linear_cross_entropy(x_BTD, kernel_DV, targets_BT, weights_BT, implementation="reference")
    np.testing.assert_allclose(total, (np.asarray(weights_BT) * nll_BT).sum(), rtol=1e-6)
    hits_BT = (logits_BTV.argmax(-1) == np.asarray(targets_BT)) & (np.asarray(weights_BT) > 0)
    assert float(stats["correct"]) == hits_BT.sum() > 0


@pytest.mark.parametrize("n_valid", [None, 37])
@pytest.mark.parametrize("train_kernel", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 7, 10])
def test_chunked_equals_reference(chunk, train_kernel, n_valid):
    options = {"n_valid": n_valid, "train_kernel": train_kernel}
    args = inputs(n_valid=n_valid or V)
    (loss, stats), grads = value_and_grads(*args, chunk=chunk, **options)
    (loss_ref, stats_ref), grads_ref = value_and_grads(*args, implementation="reference", **options)
    np.testing.assert_allclose(loss, loss_ref, rtol=1e-6)
    assert stats["correct"] == stats_ref["correct"]
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        np.testing.assert_allclose(grad, grad_ref, atol=1e-6)
    assert np.abs(grads_ref[0]).max() > 1e-3
    assert (np.abs(grads_ref[1]).max() > 1e-3) == train_kernel and np.asarray(grads[1]).any() == train_kernel
    without_gradient, _ = jax.jit(partial(linear_cross_entropy, chunk=chunk, **options))(*args)
    np.testing.assert_allclose(without_gradient / args[3].sum(), loss, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_padding_columns_have_no_probability_and_no_gradient(implementation):
    x_BTD, kernel_DV, targets_BT, weights_BT = inputs(n_valid=37)
    loud_DV = kernel_DV.at[:, 37:].set(100.0)
    (loss, stats), grads = value_and_grads(
        x_BTD, loud_DV, targets_BT, weights_BT, n_valid=37, chunk=7, implementation=implementation
    )
    (small_loss, small_stats), small_grads = value_and_grads(
        x_BTD, kernel_DV[:, :37], targets_BT, weights_BT, chunk=7, implementation=implementation
    )
    np.testing.assert_allclose(loss, small_loss, rtol=1e-6)
    assert stats["correct"] == small_stats["correct"]
    np.testing.assert_allclose(grads[0], small_grads[0], atol=1e-6)
    np.testing.assert_allclose(grads[1][:, :37], small_grads[1], atol=1e-6)
    assert not np.asarray(grads[1][:, 37:]).any()


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_positions_without_weight_may_hold_anything(implementation):
    x_BTD, kernel_DV, targets_BT, weights_BT = inputs(n_valid=37)
    off_BT = weights_BT == 0
    options = {"n_valid": 37, "chunk": 7, "implementation": implementation}
    clean = value_and_grads(x_BTD, kernel_DV, targets_BT, weights_BT, **options)
    for junk_x, junk_target in ((np.nan, 47), (np.inf, 10_000)):
        junk_BTD = jnp.where(off_BT[..., None], junk_x, x_BTD)
        junk_BT = jnp.where(off_BT, junk_target, targets_BT)
        junk = value_and_grads(junk_BTD, kernel_DV, junk_BT, weights_BT, **options)
        jax.tree.map(np.testing.assert_array_equal, junk, clean)
    nothing = jax.jit(partial(linear_cross_entropy, **options))
    total, stats = nothing(x_BTD * jnp.nan, kernel_DV, targets_BT, weights_BT * 0)
    assert total == 0 and stats["correct"] == 0


@pytest.mark.parametrize("kernel_dtype", [np.float32, jnp.bfloat16])
def test_bf16_inputs_accumulate_in_f32(kernel_dtype):
    args = inputs(jnp.bfloat16, kernel_dtype)
    (loss, _), grads = value_and_grads(*args, chunk=7)
    exact = [a.astype(jnp.float32) for a in (args[0], args[1].astype(jnp.bfloat16))]
    (loss_ref, _), grads_ref = value_and_grads(*exact, *args[2:], implementation="reference")
    assert loss.dtype == np.float32 and [g.dtype for g in grads] == [jnp.bfloat16, kernel_dtype]
    np.testing.assert_allclose(loss, loss_ref, rtol=1e-6)
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        # One rounding to bf16 (2^-9) of the logits' gradient, one of the result.
        error = np.abs(np.asarray(grad, np.float32) - grad_ref)
        assert error.max() < 2**-7 * np.abs(grad_ref).max()
        assert np.sqrt((error**2).mean()) < 2**-8 * np.sqrt((np.asarray(grad_ref) ** 2).mean())


def test_kernel_gradient_of_many_bf16_chunks_does_not_lose_small_terms():
    """300 equal contributions: a bf16 running sum would stop growing at 256 of them."""
    n = 300
    x_BTD, kernel_DV = jnp.ones((1, n, 1), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16)
    _, grads = value_and_grads(x_BTD, kernel_DV, jnp.zeros((1, n), jnp.int32), jnp.ones((1, n)), chunk=1)
    np.testing.assert_allclose(np.asarray(grads[1], np.float32), [[-0.5, 0.5]], rtol=1e-2)


def test_value_and_gradient_are_deterministic():
    args = inputs()
    first = value_and_grads(*args, chunk=7)
    for _ in range(3):
        jax.tree.map(np.testing.assert_array_equal, value_and_grads(*args, chunk=7), first)


def compiled_bytes(args, with_kernel_gradient=True, **options):
    """Outputs and temporaries of the compiled loss and gradients."""

    def loss(x_BTD, kernel_DV):
        return linear_cross_entropy(x_BTD, kernel_DV, *args[2:], **options)[0]

    grads = jax.value_and_grad(loss, argnums=(0, 1) if with_kernel_gradient else 0)
    memory = jax.jit(grads).lower(*args[:2]).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def test_all_logits_are_never_held():
    batch, seq_len, width, vocab = 2, 256, 8, 2048
    args = (
        jnp.ones((batch, seq_len, width)),
        jnp.ones((width, vocab)),
        jnp.zeros((batch, seq_len), jnp.int32),
        jnp.ones((batch, seq_len)),
    )
    all_logits = batch * seq_len * vocab * 4
    assert compiled_bytes(args, implementation="reference") >= all_logits
    chunked = compiled_bytes(args, chunk=8)
    assert chunked < all_logits / 4
    kernel_bytes = width * vocab * 4
    assert compiled_bytes(args, with_kernel_gradient=False, chunk=8, train_kernel=False) <= chunked - kernel_bytes


def test_a_constant_kernel_costs_no_matmul_of_its_gradient():
    args = inputs()
    matmuls = [
        str(jax.make_jaxpr(partial(value_and_grads, chunk=7, train_kernel=train))(*args)).count("dot_general[")
        for train in (True, False)
    ]
    assert matmuls == [3, 2]


def test_default_chunk_bounds_the_logits_and_covers_the_sequence():
    for batch, seq_len, width, vocab in [
        (16, 256, 128, 384),
        (64, 1024, 1024, 32768),
        (8, 100, 64, 65536),
        (4096, 7, 8, 8),
    ]:
        chunk = default_chunk(batch, seq_len, width, vocab, batch_shards=1)
        assert 1 <= chunk <= seq_len
        assert chunk == 1 or batch * chunk * vocab <= max(2**23, width * vocab)
    assert default_chunk(16, 256, 128, 384, 1) == 256  # small heads are one matmul
    per_device = default_chunk(16, 1024, 64, 32768, batch_shards=1)
    assert default_chunk(8 * 16, 1024, 64, 32768, batch_shards=8) == per_device


def test_gather_targets_keeps_what_is_predicted():
    x_BTD, kernel_DV, targets_BT, weights_BT = inputs()
    k = int((np.asarray(weights_BT) > 0).sum(1).max())
    assert k < T

    @partial(jax.jit, static_argnums=1)
    @jax.value_and_grad
    def value_and_grad(x_BTD, k):
        x_BkD, targets_Bk, weights_Bk = gather_targets(x_BTD, targets_BT, weights_BT, k)
        assert x_BkD.shape == (B, min(k, T), D) and targets_Bk.shape == weights_Bk.shape == (B, min(k, T))
        return linear_cross_entropy(x_BkD, kernel_DV, targets_Bk, weights_Bk)[0]

    whole, grad = value_and_grad(x_BTD, T)
    for kept in (k, T + 5):
        total, dx_BTD = value_and_grad(x_BTD, kept)
        np.testing.assert_allclose(total, whole, rtol=1e-6)
        np.testing.assert_allclose(dx_BTD, grad, atol=1e-6)
    x_BkD, targets_Bk, weights_Bk = gather_targets(x_BTD, targets_BT, weights_BT, k)
    for b in range(B):
        rows = np.flatnonzero(weights_BT[b])
        np.testing.assert_array_equal(x_BkD[b, : len(rows)], x_BTD[b, rows])
        np.testing.assert_array_equal(targets_Bk[b, : len(rows)], targets_BT[b, rows])
        np.testing.assert_array_equal(weights_Bk[b, : len(rows)], weights_BT[b, rows])
        assert not np.asarray(weights_Bk[b, len(rows) :]).any()


@pytest.mark.parametrize("batch_shards", [2, 4])
def test_batch_shards_change_nothing(batch_shards):
    args = inputs()
    (loss, stats), grads = value_and_grads(*args, chunk=7, batch_shards=batch_shards)
    (loss_ref, stats_ref), grads_ref = value_and_grads(*args, chunk=7)
    np.testing.assert_allclose(loss, loss_ref, rtol=1e-6)
    assert stats["correct"] == stats_ref["correct"]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), grads, grads_ref)
    with pytest.raises(ValueError, match="does not spread over 3 devices"):
        value_and_grads(*args, batch_shards=3)


SHARDED = """
import json, re, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[1])
from test_kernels_cross_entropy import gather_targets, inputs, value_and_grads
mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
rows = NamedSharding(mesh, P(("data", "fsdp")))
x, kernel, targets, weights = inputs()
x, targets, weights = jax.device_put((x, targets, weights), rows)
got = {}
for name, spec in (("replicated", P()), ("sharded", P(None, "fsdp"))):
    args = x, jax.device_put(kernel, NamedSharding(mesh, spec)), targets, weights
    compiled = value_and_grads.lower(*args, chunk=7, batch_shards=4).compile()
    (loss, stats), (dx, dkernel) = compiled(*args)
    loops = [part for part in compiled.as_text().split("\\n\\n") if "region" in part.split("(")[0]]
    got[name] = {
        "loss": float(loss), "correct": float(stats["correct"]),
        "dx": np.asarray(dx).tolist(), "dkernel": np.asarray(dkernel).tolist(),
        "dx_spread": dx.sharding.is_equivalent_to(rows, 3),
        "talks_per_chunk": any(re.search("all-(reduce|gather|to-all)[(]", part) for part in loops),
        "loops": len(loops),
    }
kept = jax.jit(gather_targets, static_argnums=3)(x, targets, weights, 16)
got["kept"] = np.asarray(kept[2]).tolist()
got["kept_spread"] = kept[0].sharding.is_equivalent_to(rows, 3)
print(json.dumps(got))
"""


def test_a_batch_sharded_over_four_devices_gives_the_same():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    here = os.path.dirname(__file__)
    run = subprocess.run([sys.executable, "-c", SHARDED, here], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    got = json.loads(run.stdout.splitlines()[-1])
    args = inputs()
    (loss, stats), (dx_BTD, dkernel_DV) = value_and_grads(*args, chunk=7)
    for of in (got["replicated"], got["sharded"]):
        np.testing.assert_allclose(of["loss"], loss, rtol=1e-6)
        assert of["correct"] == float(stats["correct"])
        np.testing.assert_allclose(of["dx"], dx_BTD, atol=1e-6)
        np.testing.assert_allclose(of["dkernel"], dkernel_DV, atol=1e-6)
    assert got["replicated"]["dx_spread"] and got["kept_spread"]
    assert got["replicated"]["loops"] and not got["replicated"]["talks_per_chunk"]
    np.testing.assert_array_equal(np.float32(got["kept"]), gather_targets(*args[:1], *args[2:], 16)[2])
