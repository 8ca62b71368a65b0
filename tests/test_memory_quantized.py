"""Quantized matrices: errors, layout, products and their gradients, saving and spreading.

Legend: N anything, I inputs, O outputs, L leading axes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny import same_bits

from stackwise_jax.checkpoint import Store
from stackwise_jax.config.schema import MeshConfig
from stackwise_jax.memory import Placement, make_mesh
from stackwise_jax.memory.hashing import named_leaves
from stackwise_jax.memory.quantized import (
    E2M1_LEVELS,
    NF4_LEVELS,
    QUANTIZED,
    bits_per_weight,
    dense_format,
    dequantize,
    formats_of,
    matmul,
    quantize,
    to_format,
)

BLOCK = {"int8": 128, "fp8": 128, "nf4": 64, "nvfp4": 16}
# Relative errors of gaussian weights and of products of gaussian inputs with them.
ERROR = {"int8": 0.0066, "fp8": 0.0264, "nf4": 0.0956, "nvfp4": 0.0955}
every_format = pytest.mark.parametrize("fmt", QUANTIZED)
quantized = jax.jit(quantize, static_argnums=1)
dense = jax.jit(dequantize, static_argnums=1)
product = jax.jit(matmul, static_argnums=(2, 3))
formatted = jax.jit(to_format, static_argnums=1)


def gaussian(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def restored(w, fmt) -> np.ndarray:
    return np.asarray(dense(quantized(w, fmt), jnp.float32))


def relative(found, exact) -> float:
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@every_format
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_errors_on_gaussians(fmt, dtype):
    w_IO = gaussian(512, 512).astype(dtype)
    error = relative(restored(w_IO, fmt), w_IO)
    assert 0.9 * ERROR[fmt] < error < ERROR[fmt]


@every_format
def test_bits(fmt):
    q = quantized(gaussian(3, 512, 256), fmt)
    stored = 8 * (q.nbytes - (0 if q.scale2 is None else 4 * 3)) / (3 * 512 * 256)
    assert stored == bits_per_weight(fmt) == {"int8": 8.25, "fp8": 8.25, "nf4": 4.125, "nvfp4": 4.5}[fmt]
    assert q.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(q))
    shapes = jax.eval_shape(lambda w: quantize(w, fmt), jax.ShapeDtypeStruct((3, 512, 256), jnp.bfloat16))
    assert (shapes.shape, shapes.ndim, shapes.nbytes) == ((3, 512, 256), 3, q.nbytes) == (q.shape, q.ndim, q.nbytes)


def test_dense_formats():
    assert [bits_per_weight(fmt) for fmt in ("fp32", "bf16", "fp16")] == [32, 16, 16]
    assert [dense_format(fmt) for fmt in ("fp32", "bf16", "fp16", *QUANTIZED)] == ["fp32", "bf16", "fp16"] + [
        "bf16"
    ] * 4


@every_format
def test_same_as_qwix(fmt):
    qwix = pytest.importorskip("qwix")
    w_IO, kind = gaussian(256, 128), {"fp8": "float8_e4m3fn"}.get(fmt, fmt)

    def theirs(w_IO):
        return np.asarray(qwix.dequantize(qwix.quantize(w_IO, kind, channelwise_axes=(1,), tiled_axes={0: BLOCK[fmt]})))

    assert relative(restored(w_IO, fmt), w_IO) == pytest.approx(relative(theirs(w_IO), w_IO), rel=0.02)
    if fmt == "int8":
        return  # theirs spreads the codes to 127.5
    # Scales that fp8 holds exactly: then only the codes decide.
    w_IO = np.clip(w_IO, -2.9, 2.9)
    w_IO[:: BLOCK[fmt]] = 3.0
    np.testing.assert_allclose(restored(w_IO, fmt), theirs(w_IO), rtol=1e-6)


@pytest.mark.parametrize("fmt, levels", [("nf4", NF4_LEVELS), ("nvfp4", E2M1_LEVELS)])
def test_levels_are_kept_and_lie_where_they_should(fmt, levels):
    w_IO = np.array([[level] for level in levels], np.float32) * 0.25
    q = quantized(w_IO, fmt)
    np.testing.assert_allclose(dequantize(q, jnp.float32), w_IO, rtol=1e-6)
    payload_PO = np.asarray(q.payload)
    assert [*(payload_PO & 15)[:, 0], *(payload_PO >> 4)[:, 0]] == [*range(16)]


def test_codes_of_nvfp4_are_the_bits_of_e2m1():
    w_CKO = np.linspace(-6, 6, 49, dtype=np.float32)[1:].reshape(3, 16, 1)  # values between two levels too
    q = quantized(w_CKO.reshape(48, 1), "nvfp4")
    bytes_CP = np.asarray(q.payload).reshape(3, 8)
    codes_CK = np.concatenate([bytes_CP & 15, bytes_CP >> 4], axis=1)
    scale_CO = np.asarray(q.scale).view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.asarray(q.scale2)
    expected_CK = (w_CKO[..., 0] / scale_CO).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(codes_CK, expected_CK.view(np.uint8) & 15)


@every_format
@pytest.mark.parametrize("rows", [1, 100, 130])
def test_any_number_of_rows(fmt, rows):
    w_IO = gaussian(rows, 24)
    q = quantized(w_IO, fmt)
    found_IO = dense(q, jnp.float32)
    assert q.shape == w_IO.shape == found_IO.shape
    assert relative(found_IO, w_IO) < 1.1 * ERROR[fmt]
    bytes_of_code = 1 if fmt in ("int8", "fp8") else 0.5
    assert q.payload.shape[0] <= bytes_of_code * (rows + 2 * q.scale.shape[0])  # hardly anything is padding
    x_NI = gaussian(5, rows, seed=1)
    y_NO = x_NI @ np.asarray(found_IO)
    np.testing.assert_allclose(product(x_NI, q, jnp.float32, "dequantize"), y_NO, rtol=1e-5, atol=1e-5)
    assert relative(product(x_NI, q, jnp.float32, "native"), y_NO) < 0.04


@every_format
def test_huge_and_tiny_weights(fmt):
    w_IO = gaussian(128, 16)
    for size in (1e-30, 1e-4, 1e4, 1e37):
        assert relative(restored(w_IO * np.float32(size), fmt), w_IO * np.float32(size)) < 1.05 * ERROR[fmt]
    # Scales are not below the smallest normal number, so codes are coarser here.
    assert relative(restored(w_IO * np.float32(1e-37), fmt), w_IO * np.float32(1e-37)) < 0.12


@every_format
def test_zeros_and_blocks_of_unlike_size(fmt):
    w_IO = gaussian(128, 16)
    w_IO[:64] = 0
    w_IO[:, 3] = 0
    w_IO[64:, 5] *= 1e-3
    found_IO = restored(w_IO, fmt)
    np.testing.assert_array_equal(found_IO[w_IO == 0], 0)
    assert relative(found_IO[64:, 5], w_IO[64:, 5]) < 1.5 * ERROR[fmt]
    np.testing.assert_array_equal(restored(np.zeros_like(w_IO), fmt), 0)


@every_format
def test_a_block_is_quantized_alike_in_any_company(fmt):
    w_LIO = gaussian(3, 96, 40) * np.array([1.0, 100.0, 0.01], np.float32)[:, None, None]
    together = jax.device_get(quantized(w_LIO, fmt))
    dense_LIO = np.asarray(dense(together, jnp.bfloat16))
    for i in range(3):
        alone = quantized(w_LIO[i], fmt)
        assert same_bits(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone)
        assert same_bits(dense_LIO[i], dense(alone, jnp.bfloat16))
    if fmt == "nf4":
        assert same_bits(together, quantize(w_LIO, fmt))  # op by op


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_native_products(fmt, dtype):
    x_NI, q = gaussian(2, 32, 384, seed=1).astype(dtype), quantized(gaussian(384, 64) / 20, fmt)
    native, exact = product(x_NI, q, dtype, "native"), x_NI.astype(np.float32) @ np.asarray(dense(q, jnp.float32))
    assert native.dtype == dtype and native.shape == (2, 32, 64)
    assert 0.5 * ERROR[fmt] < relative(native, exact) < 1.2 * ERROR[fmt]
    # A row is scaled by itself: however large one is, the others keep their digits.
    x_NI[0, 0] *= np.asarray(1e4, dtype)
    x_NI[1] = 0
    others = np.asarray(product(x_NI, q, dtype, "native"))
    np.testing.assert_array_equal(others[0, 1:], np.asarray(native)[0, 1:])
    np.testing.assert_array_equal(others[1], 0)


@every_format
@pytest.mark.parametrize("how", ["dequantize", "native"])
def test_only_the_input_has_a_gradient(fmt, how):
    x_NI, q, dy_NO = gaussian(8, 96, seed=1), quantized(gaussian(96, 24), fmt), gaussian(8, 24, seed=2)
    loss = lambda x_NI, scale2: jnp.vdot(matmul(x_NI, dataclasses.replace(q, scale2=scale2), jnp.float32, how), dy_NO)
    dx_NI, d_scale2 = jax.jit(jax.grad(loss, argnums=(0, 1)))(x_NI, q.scale2)
    np.testing.assert_allclose(dx_NI, dy_NO @ np.asarray(dense(q, jnp.float32)).T, rtol=1e-5, atol=1e-5)
    assert q.scale2 is None or not np.any(d_scale2)


def stack_tree():
    """Shaped as a stack's tree."""
    matrix = lambda seed: {"kernel": jnp.asarray(gaussian(2, 64, 32, seed=seed))}
    return {"blocks": {"attn": {"q": matrix(0), "k": matrix(1)}, "attn_norm": {"scale": jnp.ones((2, 64))}}}


@every_format
def test_trees_change_their_format(fmt):
    tree = stack_tree()
    q_tree = formatted(tree, fmt)
    kernel, norm = q_tree["blocks"]["attn"]["k"]["kernel"], q_tree["blocks"]["attn_norm"]["scale"]
    assert same_bits(kernel, quantized(tree["blocks"]["attn"]["k"]["kernel"], fmt)) and norm.dtype == jnp.float32
    assert formats_of(q_tree) == {fmt} and formats_of(tree) == {"dense"}
    assert same_bits(formatted(q_tree, fmt), q_tree)
    half = formatted(q_tree, "bf16")
    assert same_bits(half["blocks"]["attn"]["k"]["kernel"], dense(kernel, jnp.bfloat16))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(half))
    other = "fp8" if fmt == "int8" else "int8"
    turned = formatted(q_tree, other)["blocks"]["attn"]["k"]["kernel"]
    assert same_bits(turned, quantized(dense(kernel, jnp.float32), other))
    shapes = jax.eval_shape(lambda tree: to_format(tree, fmt), tree)
    assert jax.tree.structure(shapes) == jax.tree.structure(q_tree)
    with pytest.raises(ValueError, match="fp7"):
        to_format(tree, "fp7")


@every_format
def test_saved_as_they_are(fmt, tmp_path):
    tree = formatted(stack_tree(), fmt)
    store = Store(tmp_path)
    store.save_item("stacks/000", 0, tree, {"format": fmt})
    like = jax.eval_shape(lambda tree: to_format(tree, fmt), stack_tree())
    loaded = store.load_item("stacks/000", 0, like)
    store.close()
    assert same_bits(loaded, tree) and jax.tree.structure(loaded) == jax.tree.structure(tree)
    second = {"scale2"} if fmt in ("nf4", "nvfp4") else set()
    names = {name.removeprefix("blocks/attn/q/kernel/") for name in named_leaves(tree) if "/q/" in name}
    assert names == {"payload", "scale"} | second


@every_format
def test_placed_like_weights(fmt):
    placement, tree = Placement(make_mesh(MeshConfig(), jax.devices()[:1])), formatted(stack_tree(), fmt)
    shardings = placement.params(tree)
    assert jax.tree.structure(shardings) == jax.tree.structure(tree)
    with jax.transfer_guard("disallow"):
        placed = placement.put(jax.device_get(tree), shardings)
    assert same_bits(placed, tree)


def temporaries(n_blocks: int, fmt: str, how: str) -> int:
    """Bytes of the gradient to x of a scan over so many matrices."""

    def loss(x_NI, q):
        return jax.lax.scan(lambda x_NI, q: (jnp.tanh(matmul(x_NI, q, jnp.bfloat16, how)), None), x_NI, q)[0].sum()

    x_NI = jax.ShapeDtypeStruct((2, 512), jnp.bfloat16)
    q = jax.eval_shape(lambda w: quantize(w, fmt), jax.ShapeDtypeStruct((n_blocks, 512, 512), jnp.float32))
    return jax.jit(jax.grad(loss)).lower(x_NI, q).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("fmt, how", [("nvfp4", "dequantize"), ("fp8", "native")])
def test_one_matrix_at_a_time_is_dense(fmt, how):
    matrix = 512 * 512 * 2
    one, eight = temporaries(1, fmt, how), temporaries(8, fmt, how)
    assert eight - one < matrix / 4 and eight < 4 * matrix


@every_format
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_what_is_not_finite_is_seen_afterwards(fmt, bad, dtype):
    """Its whole block is NaN, and no other block changes. Wide matrices: there XLA's maximum passes over NaN."""
    w_LIO = gaussian(2, 192, 40)
    w_LIO[1, 100, 30] = 9.0
    clean_LIO = restored(w_LIO.astype(dtype), fmt)
    w_LIO[0, 70, 20], w_LIO[0, 3, 39] = bad, bad
    n_blocks = -(-192 // BLOCK[fmt])
    expected = np.zeros((2, n_blocks, 192 // n_blocks, 40), bool)
    for row, column in ((70, 20), (3, 39)):
        expected[0, row * n_blocks // 192, :, column] = True
    found_LIO = restored(w_LIO.astype(dtype), fmt)
    np.testing.assert_array_equal(np.isnan(found_LIO), expected.reshape(2, 192, 40))
    assert same_bits(restored(w_LIO.astype(dtype)[1], fmt), clean_LIO[1])
    near = ~np.isnan(found_LIO[0])
    assert relative(found_LIO[0][near], w_LIO[0][near]) < 1.1 * ERROR[fmt]


@every_format
@pytest.mark.parametrize("how", ["dequantize", "native"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_products_show_what_is_not_finite(fmt, how, bad):
    x_NI, w_IO = gaussian(64, 256, seed=1), gaussian(256, 64) / 16
    q = quantized(w_IO, fmt)
    x_NI[5, 7] = bad
    bad_NO = ~np.isfinite(np.asarray(product(x_NI, q, jnp.float32, how)))
    assert bad_NO[5].any() and not np.delete(bad_NO, 5, axis=0).any()
    w_IO[9, 3] = bad
    x_NI[5, 7] = 0
    bad_NO = ~np.isfinite(np.asarray(product(x_NI, quantized(w_IO, fmt), jnp.float32, how)))
    assert bad_NO[:, 3].all() and not np.delete(bad_NO, 3, axis=1).any()


@every_format
@pytest.mark.parametrize("top", [3.4028235e38, 3e38, 1e38, 8e37])
def test_the_largest_numbers_keep_their_digits(fmt, top):
    w_IO = np.clip(gaussian(128, 16) / 4, -1, 1) * np.float32(top)
    w_IO[::16] = np.float32(top)
    w_IO[64:, 3] = 1e-45
    found_IO = restored(w_IO, fmt)
    assert np.isfinite(found_IO).all()
    assert relative(found_IO, w_IO) < 1.1 * ERROR[fmt]
