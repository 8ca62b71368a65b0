"""Feature attention: its formula, how positions enter it, and its kernel against plain attention over the features.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads, d and e sizes of a query-key and a
value head, F frequencies.
"""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.kernels import dispatch
from stackwise_jax.kernels.feature_attention import api, feature_attention, trig_features
from stackwise_jax.kernels.feature_attention.arg_specs import ARG_SPECS, ArgSpec, make_args
from stackwise_jax.kernels.feature_attention.bench import compile_feature_attention
from stackwise_jax.kernels.pallas import refusal
from stackwise_jax.kernels.pallas.calls import Tiles, Tiling
from stackwise_jax.kernels.pallas.flash import feature_flash_attention

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

B, T, H, K, D_HEAD, VALUE, F = 2, 12, 4, 2, 6, 5, 7
ON_CPU = jax.default_backend() == "cpu"
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True} if ON_CPU else {}
SMALL = Tiling(Tiles(32, 16, 4), Tiles(16, 32, 4), Tiles(16, 16, 4))
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], np.int32)
ROTARY = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], range(12)], np.int32)


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def arguments(
    n_queries=T, n_keys=T, n_heads=H, n_kv=K, size=D_HEAD, value_size=VALUE, n_frequencies=F, dtype=np.float32
):
    rng = np.random.default_rng(0)
    shapes = {"q_BTHd": (B, n_queries, n_heads, size), "k_BSKd": (B, n_keys, n_kv, size)}
    shapes |= {"v_BSKe": (B, n_keys, n_kv, value_size)}
    heads = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    maps = {"frequencies_dF": rng.normal(size=(size, n_frequencies)), "angles_F": rng.uniform(0, 1, n_frequencies)}
    return heads | {name: jnp.asarray(x, np.float32) for name, x in maps.items()}


def naive(q_BTHd, k_BSKd, v_BSKe, frequencies_dF, angles_F, *, scale, sees, q_rotary_BT, kv_rotary_BS):
    """One query and head at a time, float64."""
    q, k, v, w, a = (np.asarray(x, np.float64) for x in (q_BTHd, k_BSKd, v_BSKe, frequencies_dF, angles_F))

    def phi(x, position):
        phase = x @ w + position * a
        return np.concatenate([np.cos(phase), np.sin(phase)]) / np.sqrt(len(a))

    o = np.zeros((*q.shape[:3], v.shape[3]))
    for b, t, h in np.ndindex(*q.shape[:3]):
        head, kept = h // (q.shape[2] // k.shape[2]), [s for s in range(k.shape[1]) if sees(b, t, s)]
        phi_q = phi(q[b, t, h], q_rotary_BT[b, t])
        p = np.exp([scale * phi_q @ phi(k[b, s, head], kv_rotary_BS[b, s]) for s in kept])
        o[b, t, h] = (p / p.sum()) @ v[b, kept, head] if kept else 0
    return o


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_formula(monkeypatch, implementation, causal):
    monkeypatch.setattr("stackwise_jax.kernels.attention.chunked.MAX_SCORES", 5 * T)
    args = arguments()
    options = {"causal": causal, "scale": 3.0, "implementation": implementation}
    options |= {"q_segment_ids_BT": SEGMENTS, "q_rotary_BT": ROTARY, "kv_rotary_BS": ROTARY}
    got = jax.jit(partial(feature_attention, **options))(**args)

    def sees(b, t, s):
        return SEGMENTS[b, t] == SEGMENTS[b, s] != 0 and (s <= t or not causal)

    expected = naive(*args.values(), scale=3.0, sees=sees, q_rotary_BT=ROTARY, kv_rotary_BS=ROTARY)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_positions_in_phases_are_relative_and_rows_where_none_are_given():
    args, rows = arguments(), np.arange(T)[None]
    attend = jax.jit(partial(feature_attention, **args, causal=True, scale=3.0))
    plain = attend()
    np.testing.assert_allclose(attend(q_rotary_BT=rows + 40, kv_rotary_BS=rows + 40), plain, atol=1e-5)
    assert np.abs(attend(q_rotary_BT=rows + 1) - plain).max() > 1e-2
    without = jax.jit(partial(feature_attention, **args | {"angles_F": None}, causal=True, scale=3.0))
    np.testing.assert_allclose(without(q_rotary_BT=rows + 1), without(), atol=0)


def test_the_order_is_apart_from_positions_in_phases():
    args, rows = arguments(), jnp.arange(T)[None]
    attend = jax.jit(partial(feature_attention, causal=True, scale=3.0))
    full = attend(**args)
    for start, stop in ((0, 4), (4, 12)):
        part = args | {"q_BTHd": args["q_BTHd"][:, start:stop]}
        got = attend(**part, q_rotary_BT=rows[:, start:stop], q_positions_BT=rows[:, start:stop])
        np.testing.assert_allclose(got, full[:, start:stop], atol=2e-6)


def test_products_of_features_estimate_the_gaussian_kernel():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 1, 20, 1, 3)) * 0.7
    frequencies = rng.normal(size=(3, 20_000))
    phi_x, phi_y = (np.concatenate(trig_features(jnp.asarray(z), frequencies, None, None), -1) for z in (x, y))
    estimate = (phi_x * phi_y).sum(-1) / 20_000
    np.testing.assert_allclose(estimate, np.exp(-np.square(x - y).sum(-1) / 2), atol=0.03)


def values_and_grads(f, arguments, **options):
    """o, and the gradients of a function of o."""

    def loss(arguments):
        o_BTHe = f(**arguments, **options)
        return jnp.sum(jnp.sin(o_BTHe.astype(jnp.float32))), o_BTHe

    (_, o_BTHe), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)(arguments)
    return {"o_BTHe": o_BTHe} | grads


def assert_equal(got, expected):
    for name, x in expected.items():
        np.testing.assert_allclose(got[name], x, atol=3e-6 * max(1, np.abs(x).max()), err_msg=name)


flash = partial(feature_flash_attention, interpret=ON_CPU)
reference = partial(feature_attention, implementation="reference")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_frequencies", [16, 21])
@pytest.mark.parametrize("positions", [True, False])
def test_kernel_equals_the_reference(causal, n_frequencies, positions):
    args = arguments(50, 50, value_size=20, n_frequencies=n_frequencies)
    options = {"causal": causal, "scale": 3.0}
    if positions:
        ids = np.array([[1] * 20 + [2] * 25 + [0] * 5, [3] * 50], np.int32)
        rotary = np.array([[*range(20), *range(25), *[0] * 5], range(50)], np.int32)
        options |= {"q_segment_ids_BT": ids, "kv_segment_ids_BS": ids, "q_rotary_BT": rotary, "kv_rotary_BS": rotary}
    else:
        del args["angles_F"]
    got, expected = values_and_grads(flash, args, tiling=SMALL, **options), values_and_grads(reference, args, **options)
    assert_equal(got, expected)
    if positions:
        assert not np.asarray(got["o_BTHe"])[ids == 0].any()


def test_kernel_with_default_tiles_and_unlike_lengths_equals_the_reference():
    args = arguments(40, 75, n_kv=1, size=16, value_size=16, n_frequencies=32)
    rows = {"q_rotary_BT": np.arange(40)[None], "kv_rotary_BS": np.arange(75)[None]}
    got, expected = (values_and_grads(f, args, causal=False, scale=3.0, **rows) for f in (flash, reference))
    assert_equal(got, expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_kernel_in_half_precision_is_close_to_float32(dtype, segmented, causal):
    args = arguments(40, 40, n_frequencies=32, dtype=dtype)
    how = {"q_rotary_BT": np.arange(40)[None], "kv_rotary_BS": np.arange(40)[None], "causal": causal, "scale": 3.0}
    if segmented:
        ids = np.array([[1] * 15 + [2] * 18 + [0] * 7, [3] * 40], np.int32)
        how |= {"q_segment_ids_BT": ids, "kv_segment_ids_BS": ids}
    got = values_and_grads(flash, args, tiling=SMALL, **how)
    assert all(got[name].dtype == x.dtype for name, x in args.items()) and got["o_BTHe"].dtype == dtype
    # Frequencies enter products in the dtype of the heads.
    exact = {name: x.astype(jnp.float32) for name, x in args.items()}
    exact["frequencies_dF"] = args["frequencies_dF"].astype(dtype).astype(jnp.float32)
    expected = values_and_grads(reference, exact, **how)
    for name, x in expected.items():
        tolerance = 0.03 * float(jnp.abs(x).max())
        np.testing.assert_allclose(got[name].astype(jnp.float32), x, atol=tolerance, err_msg=name)


def test_backward_pass_keeps_no_features_and_nothing_quadratic():
    args = arguments(64, 96, n_frequencies=32)
    del args["angles_F"]

    def kept(f, **options):
        def residuals(arguments):
            return jax.tree.leaves(jax.vjp(lambda a: f(**a, causal=False, scale=3.0, **options), arguments)[1])

        return [x.shape for x in jax.eval_shape(residuals, args)]

    assert any(32 in shape[2:] for shape in kept(reference))
    shapes = kept(flash, tiling=SMALL)
    assert not any(64 in shape and 96 in shape for shape in shapes)
    assert [shape for shape in shapes if 32 in shape[2:]] == []


# Which implementation is chosen.


@pytest.fixture
def chosen(monkeypatch):
    """A function that tells which implementation a call uses, as without a GPU; nothing is computed."""
    used = []
    monkeypatch.setattr(dispatch, "cuda_capability", lambda: None)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(api, "refusal", lambda *_, **__: None)
    monkeypatch.setattr(api, "feature_attention_pallas", lambda *_, **__: used.append("pallas"))
    monkeypatch.setattr(api, "attention", lambda *_, implementation, **__: used.append(implementation))
    dispatch._log_once.cache_clear()

    def tell(*, causal=True, dtype=jnp.bfloat16, n_frequencies=F, **options):
        args = arguments(dtype=dtype, n_frequencies=n_frequencies)
        feature_attention(**args, causal=causal, scale=3.0, **options)
        return used.pop()

    return tell


def test_the_sizes_choose_without_a_gpu_and_the_kernel_with_one(chosen, monkeypatch):
    assert chosen() == "reference"
    monkeypatch.setattr("stackwise_jax.kernels.attention.api.MAX_REFERENCE_SCORES", T * T - 1)
    assert chosen() == "chunked"
    monkeypatch.setattr(dispatch, "cuda_capability", lambda: 9.0)
    assert chosen() == "pallas"
    assert chosen(dtype=np.float32) == "chunked"
    assert chosen(q_positions_BT=ROTARY) == "chunked"
    assert chosen(q_positions_BT=ROTARY, causal=False) == "pallas"
    assert chosen(implementation="reference") == "reference"


def test_what_the_kernel_cannot_do_is_done_and_said_once(chosen, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, "stackwise_jax"):
        assert [chosen(implementation="pallas") for _ in range(2)] == ["reference"] * 2
        monkeypatch.setattr(dispatch, "cuda_capability", lambda: 9.0)
        assert chosen(implementation="pallas", n_frequencies=300) == "reference"
    first, second = (record.getMessage() for record in caplog.records)
    assert first == ("feature_attention: reference instead of pallas: it needs an NVIDIA GPU of compute capability 8.0")
    assert "sizes up to 256" in second


def test_what_the_compiler_refuses_is_done_and_said_once(chosen, monkeypatch, caplog):
    monkeypatch.setattr(api, "refusal", refusal)  # on a CPU nothing compiles for Triton
    monkeypatch.setattr(dispatch, "cuda_capability", lambda: 9.0)
    with caplog.at_level(logging.WARNING, "stackwise_jax"):
        assert [chosen(implementation="pallas") for _ in range(2)] == ["reference"] * 2
        assert chosen() == "reference"
    (record,) = caplog.records
    assert "reference instead of pallas: it does not compile here" in record.getMessage()


@pytest.mark.parametrize("name", ARG_SPECS)
def test_named_shapes_are_arguments(name):
    spec = ARG_SPECS[name]
    args = jax.eval_shape(partial(make_args, spec), jax.random.key(0))
    o_BTHe = jax.eval_shape(partial(feature_attention, causal=spec.causal, scale=3.0), **args)
    assert o_BTHe.shape == (spec.batch, spec.rows, spec.heads, spec.value_size) and o_BTHe.dtype == spec.dtype


def test_flops_are_those_of_scores_and_of_phases():
    spec = ArgSpec(2, 12, 4, 2, size=8, value_size=5, frequencies=3)
    seen, phases = 12 * 13 // 2, (4 + 2) * 12 * 8 * 3
    assert spec.flops(backward=False) == 2 * 2 * (4 * seen * (6 + 5) + phases)
    assert spec.flops(backward=True) == 2 * 2 * (4 * seen * (4 * 6 + 3 * 5) + 4 * phases)


def test_a_shape_compiles_and_runs_where_the_implementation_can():
    spec = ArgSpec(1, 16, 2, 1, size=8, value_size=8, frequencies=4, dtype="float32")
    call = compile_feature_attention(spec, "chunked", backward=True)
    assert call is not None and call.temp_bytes > 0 and call.flops == spec.flops(backward=True)
    call.run(2)
    assert (compile_feature_attention(spec, "pallas", backward=False) is None) == (not dispatch.cuda_capability())


def test_misfits_are_refused():
    args = arguments()
    with pytest.raises(ValueError, match=r"do not fit: q \(2, 12, 4, 6\), frequencies \(5, 7\), angles \(7,\)"):
        feature_attention(**args | {"frequencies_dF": args["frequencies_dF"][:5]}, causal=True, scale=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        feature_attention(**args | {"angles_F": args["angles_F"][:5]}, causal=True, scale=1.0)
    with pytest.raises(ValueError, match="attention shapes do not fit"):
        feature_attention(**args | {"k_BSKd": args["k_BSKd"][..., :5]}, causal=True, scale=1.0)
    with pytest.raises(ValueError, match="write one of auto, reference, chunked, pallas"):
        feature_attention(**args, causal=True, scale=1.0, implementation="cudnn")
