"""Which implementation computes attention, what is said when it is not the one asked for, and what cuDNN gets.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads, d and e sizes of a query-key and a
value head, r size of the shared part.
"""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.kernels import dispatch
from stackwise_jax.kernels.attention import api, attention, cudnn
from stackwise_jax.kernels.pallas import refusal

B, T, H, K, D_HEAD = 2, 12, 4, 2, 8
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], np.int32)
POSITIONS = np.broadcast_to(np.arange(T), (B, T))


def qkv(n_keys=T, dtype=np.float32, value_size=D_HEAD):
    rng = np.random.default_rng(0)
    shapes = (B, T, H, D_HEAD), (B, n_keys, K, D_HEAD), (B, n_keys, K, value_size)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def shared_parts(r=4, dtype=np.float32):
    rng = np.random.default_rng(1)
    shapes = {"q_shared_BTHr": (B, T, H, r), "k_shared_BSr": (B, T, r)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


@pytest.fixture
def chosen(monkeypatch):
    """A function that tells which implementation a call of `attention` uses, as without a GPU; nothing is computed."""
    used = []
    monkeypatch.setattr(dispatch, "cuda_capability", lambda: None)
    for name in api.IMPLEMENTATIONS:
        instead = lambda q_BTHd, k_BSKd, v_BSKe, name=name, **_: used.append(name) or v_BSKe
        monkeypatch.setitem(api.IMPLEMENTATIONS, name, instead)
    dispatch._log_once.cache_clear()

    def tell(*args, causal=True, **options):
        attention(*args, causal=causal, **options)
        return used.pop()

    return tell


@pytest.fixture
def on_cuda(chosen, monkeypatch):
    """As on one NVIDIA GPU with cuDNN, as far as the choice goes."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(dispatch, "cuda_capability", lambda: 9.0)
    monkeypatch.setattr(api, "refusal", lambda *_, **__: None)
    monkeypatch.setattr(jax.nn, "dot_product_attention", as_cudnn)


def as_cudnn(*args, implementation, **options):
    assert implementation == "cudnn"
    return dot_product_attention(*args, implementation="xla", **options)


dot_product_attention = jax.nn.dot_product_attention


def test_without_a_gpu_the_sizes_choose(chosen, monkeypatch):
    assert chosen(*qkv()) == "reference"
    monkeypatch.setattr("stackwise_jax.kernels.attention.api.MAX_REFERENCE_SCORES", T * T - 1)
    assert chosen(*qkv()) == "chunked"
    assert chosen(*qkv(dtype=jnp.bfloat16)) == "chunked"
    assert chosen(*qkv(), implementation="reference") == "reference"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "cudnn"),
        ({"causal": False}, "cudnn"),
        (shared_parts(dtype=jnp.bfloat16), "cudnn"),
        ({"q_segment_ids_BT": SEGMENTS}, "pallas"),
        ({"q_positions_BT": POSITIONS}, "reference"),
        ({"q_positions_BT": POSITIONS, "causal": False}, "cudnn"),  # where nothing is ordered positions say nothing
        ({"implementation": "pallas"}, "pallas"),
        ({"implementation": "chunked"}, "chunked"),
    ],
)
def test_a_gpu_prefers_cudnn_and_then_pallas(chosen, on_cuda, options, expected):
    assert chosen(*qkv(dtype=jnp.bfloat16), **options) == expected


def test_float32_stays_with_plain_products_unless_asked(chosen, on_cuda):
    assert chosen(*qkv()) == "reference"
    assert chosen(*qkv(), implementation="pallas") == "pallas"


@pytest.mark.parametrize(
    ("asked", "args", "options", "expected", "reason"),
    [
        (
            "cudnn",
            {"dtype": jnp.bfloat16},
            {"q_segment_ids_BT": SEGMENTS},
            "pallas",
            "neither segment ids nor positions",
        ),
        ("cudnn", {"dtype": np.float32}, {}, "reference", "bfloat16 or float16, not float32"),
        ("cudnn", {"dtype": jnp.bfloat16, "n_keys": 9}, {}, "pallas", "as many queries as keys"),
        ("pallas", {"dtype": jnp.bfloat16}, {"q_positions_BT": POSITIONS}, "reference", "no explicit positions"),
        ("pallas", {"dtype": jnp.bfloat16, "value_size": 300}, {}, "cudnn", "sizes up to 256"),
        ("pallas", {"dtype": np.float64}, {}, "reference", "one dtype of bfloat16, float16 and float32, not float64"),
    ],
)
def test_what_cannot_be_done_as_asked_is_done_and_said_once(
    chosen, on_cuda, caplog, asked, args, options, expected, reason
):
    with jax.enable_x64(True), caplog.at_level(logging.WARNING, "stackwise_jax"):
        assert chosen(*qkv(**args), implementation=asked, **options) == expected
        assert chosen(*qkv(**args), implementation=asked, **options) == expected
    (record,) = caplog.records
    assert record.name == "stackwise_jax" and reason in record.getMessage()
    assert record.getMessage().startswith(f"attention: {expected} instead of {asked}: it ")


def test_a_kernel_that_does_not_compile_gives_way(chosen, on_cuda, monkeypatch, caplog):
    monkeypatch.setattr(api, "refusal", refusal)  # on a CPU nothing compiles for Triton
    how = {"q_segment_ids_BT": jnp.asarray(SEGMENTS), **shared_parts(dtype=jnp.bfloat16)}
    with caplog.at_level(logging.WARNING, "stackwise_jax"):
        assert [chosen(*qkv(dtype=jnp.bfloat16), implementation="pallas", **how) for _ in range(2)] == ["reference"] * 2
    (record,) = caplog.records
    assert "reference instead of pallas: it does not compile here" in record.getMessage()


def test_no_gpu_no_kernel(chosen, caplog):
    with caplog.at_level(logging.WARNING, "stackwise_jax"):
        assert [chosen(*qkv(), implementation=asked) for asked in ("cudnn", "pallas")] == ["reference"] * 2
    assert [r.getMessage().partition(": ")[0] for r in caplog.records] == ["attention"] * 2
    assert all("an NVIDIA GPU of compute capability 8.0" in r.getMessage() for r in caplog.records)


def test_what_jax_says_against_cudnn_is_a_reason(chosen, on_cuda, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("mla requires cudnn version >= 9.10")

    args = qkv(dtype=jnp.bfloat16)
    assert cudnn.obstacle(*args, causal=True, masked=False, scale=1.0) is None
    monkeypatch.setattr(jax.nn, "dot_product_attention", refuse)
    assert cudnn.obstacle(*args, causal=True, masked=False, scale=1.0) == "mla requires cudnn version >= 9.10"
    assert chosen(*args) == "pallas"


def test_several_devices_and_old_ones_have_no_kernel(chosen, on_cuda, monkeypatch):
    segments = {"q_segment_ids_BT": SEGMENTS}
    assert chosen(*qkv(dtype=jnp.bfloat16), **segments) == "pallas"
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert chosen(*qkv(dtype=jnp.bfloat16), **segments) == "reference"
    assert chosen(*qkv(dtype=jnp.bfloat16)) == "cudnn"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(dispatch, "cuda_capability", lambda: 7.5)
    assert chosen(*qkv(dtype=jnp.bfloat16), **segments) == chosen(*qkv(dtype=jnp.bfloat16)) == "reference"


@pytest.mark.parametrize("value_size", [5, 21])
@pytest.mark.parametrize("r", [0, 3])
def test_joining_and_padding_for_cudnn_is_exact(monkeypatch, value_size, r):
    monkeypatch.setattr(jax.nn, "dot_product_attention", as_cudnn)
    args, shared = qkv(value_size=value_size), shared_parts(r=r) if r else {}

    def loss(args, shared, f):
        o_BTHe = f(*args, causal=True, scale=0.3, **shared)
        assert o_BTHe.shape == (B, T, H, value_size)
        return jnp.sum(jnp.sin(o_BTHe))

    of = [jax.jit(jax.value_and_grad(partial(loss, f=f), argnums=(0, 1))) for f in (cudnn.attention_cudnn, attention)]
    (got, grads), (expected, grads_ref) = (f(args, shared) for f in of)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6), grads, grads_ref)
