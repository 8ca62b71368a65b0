"""Flash attention in Pallas against the reference: interpreted on a CPU, compiled on a GPU; that it compiles for one.

Legend: B batch, T query rows, S key/value rows, H query heads, K key/value heads, d and e sizes of a query-key and a
value head, r size of the shared part, F frequencies.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from stackwise_jax.kernels.attention import attention
from stackwise_jax.kernels.attention.arg_specs import ARG_SPECS, make_args
from stackwise_jax.kernels.pallas.calls import Tiles, Tiling
from stackwise_jax.kernels.pallas.entry import MAX_BYTES, MAX_SIZE
from stackwise_jax.kernels.pallas.flash import default_tiling, feature_flash_attention, flash_attention

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

B = 2
ON_CPU = jax.default_backend() == "cpu"
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True} if ON_CPU else {}
# Unlike tiles, small enough that short sequences have several; T is filled up to multiples of 32, as is S.
SMALL = Tiling(Tiles(32, 16, 4), Tiles(16, 32, 4), Tiles(16, 16, 4))

SIZES = {  # T, S, H, K, d, e, r
    "multi-head": (70, 70, 2, 2, 16, 16, 0),
    "grouped heads": (64, 64, 4, 2, 16, 16, 0),
    "one key head": (33, 33, 3, 1, 8, 16, 0),
    "unlike values": (70, 70, 2, 1, 16, 40, 0),
    "shared part": (70, 70, 2, 2, 16, 16, 8),
    "shared part, grouped heads, odd sizes": (50, 50, 4, 2, 24, 20, 10),
    "more keys": (40, 75, 2, 1, 16, 16, 8),
    "more queries": (75, 40, 2, 2, 16, 16, 0),
    "shorter than a tile": (5, 5, 2, 2, 16, 16, 8),
}
LAYOUTS = {  # segment ids of a row of 70
    "documents and padding": [1] * 20 + [2] * 31 + [3] * 12 + [0] * 7,
    "padding first": [0] * 40 + [5] * 30,
    "single tokens": [*range(1, 60), *[0] * 11],
    "no order": [1, 2] * 20 + [0, 3] * 15,
}


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def arguments(T, S, H, K, d, e, r, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"q_BTHd": (B, T, H, d), "k_BSKd": (B, S, K, d), "v_BSKe": (B, S, K, e)}
    shapes |= {"q_shared_BTHr": (B, T, H, r), "k_shared_BSr": (B, S, r)} if r else {}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def values_and_grads(f, arguments, **options):
    """o, and the gradients of a function of o."""

    def loss(arguments):
        o_BTHe = f(**arguments, **options)
        return jnp.sum(jnp.sin(o_BTHe.astype(jnp.float32))), o_BTHe

    (_, o_BTHe), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)(arguments)
    return {"o_BTHe": o_BTHe} | grads


def flash(q_BTHd, *args, q_shared_BTHr=None, tiling=SMALL, **options):
    size = q_BTHd.shape[3] + (0 if q_shared_BTHr is None else q_shared_BTHr.shape[3])
    options |= {"q_shared_BTHr": q_shared_BTHr, "scale": size**-0.5, "tiling": tiling, "interpret": ON_CPU}
    return flash_attention(q_BTHd, *args, **options)


reference = partial(attention, implementation="reference")


def assert_equal(got, expected, atol):
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_allclose(
            got[name].astype(jnp.float32), expected[name].astype(jnp.float32), rtol=1e-6, atol=atol, err_msg=name
        )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_reference(sizes, causal):
    args = arguments(*SIZES[sizes])
    assert_equal(values_and_grads(flash, args, causal=causal), values_and_grads(reference, args, causal=causal), 5e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_segments_equal_the_reference_and_what_sees_nothing_gives_zero(layout, causal):
    args = arguments(70, 70, 4, 2, 24, 20, 10)  # groups of heads, a shared part, sizes that are filled up
    ids = np.stack([LAYOUTS[layout], np.roll(LAYOUTS[layout], 9)]).astype(np.int32)
    options = {"causal": causal, "q_segment_ids_BT": ids, "kv_segment_ids_BS": ids}
    got = values_and_grads(flash, args, **options)
    assert_equal(got, values_and_grads(reference, args, **options), 5e-6)
    for name, x in got.items():
        assert not np.asarray(x)[ids == 0].any() and np.asarray(x)[ids != 0].any(), name


@pytest.mark.parametrize("causal", [True, False])
def test_keys_of_another_length_have_segments_of_their_own(causal):
    args = arguments(*SIZES["more keys"])
    ids = {"q_segment_ids_BT": np.repeat([[1, 4, 2, 0]], 10, 1), "kv_segment_ids_BS": np.repeat([[0, 2, 1]], 25, 1)}
    options = {name: jnp.broadcast_to(x, (B, x.shape[1])).astype(jnp.int32) for name, x in ids.items()}
    got, expected = (values_and_grads(f, args, causal=causal, **options) for f in (flash, reference))
    assert_equal(got, expected, 5e-6)
    assert not np.asarray(got["o_BTHe"])[:, 10:20].any()


@pytest.mark.parametrize(("segmented", "causal"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("sizes", ["grouped heads", "shared part, grouped heads, odd sizes"])
def test_half_precision_is_close_to_float32(sizes, dtype, segmented, causal):
    args = arguments(*SIZES[sizes], dtype=dtype)
    rows, options = args["q_BTHd"].shape[1], {"causal": causal}
    if segmented:
        ids = np.stack([row[:rows] for row in (LAYOUTS["documents and padding"], LAYOUTS["padding first"])])
        options |= {"q_segment_ids_BT": ids.astype(np.int32), "kv_segment_ids_BS": ids.astype(np.int32)}
    got = values_and_grads(flash, args, **options)
    assert all(x.dtype == dtype for x in got.values())
    exact = {name: x.astype(jnp.float32) for name, x in args.items()}
    expected = values_and_grads(reference, exact, **options)
    for name, x in expected.items():
        tolerance = (0.02 if dtype == jnp.bfloat16 else 0.003) * float(jnp.abs(x).max())
        np.testing.assert_allclose(got[name].astype(jnp.float32), x, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("size", [16, 128])
def test_default_tiles_equal_the_reference(size):
    args = arguments(200, 200, 2, 1, size, size, 0)
    got = values_and_grads(flash, args, causal=True, tiling=None)
    assert_equal(got, values_and_grads(reference, args, causal=True), 2e-5)


def test_large_scores_stay_finite():
    args = arguments(*SIZES["multi-head"])
    args |= {name: 300 * args[name] for name in ("q_BTHd", "k_BSKd")}
    got, expected = (values_and_grads(f, args, causal=True) for f in (flash, reference))
    np.testing.assert_allclose(got["o_BTHe"], expected["o_BTHe"], atol=1e-4)
    assert all(np.isfinite(x).all() for x in got.values())


def test_blocks_that_are_computed_again_in_a_scan_have_the_same_gradient():
    args = arguments(*SIZES["multi-head"])

    def blocks(q_BTHd, k_BSKd, v_BSKe, f):
        body = jax.checkpoint(lambda q_BTHd, _: (q_BTHd + f(q_BTHd, k_BSKd, v_BSKe, causal=True), None))
        return jax.lax.scan(body, q_BTHd, length=3)[0]

    got, expected = (values_and_grads(partial(blocks, f=f), args) for f in (flash, reference))
    assert_equal(got, expected, 2e-5)


def shapes_in(jaxpr):
    """Of everything that is computed outside the kernels."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        if equation.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(equation.params):
                yield from shapes_in(inner)


@pytest.mark.parametrize("f", [flash, reference])
def test_nothing_quadratic_is_held_and_no_key_is_repeated(f):
    T, S, H, K = 96, 160, 6, 3
    gradients = jax.grad(lambda arguments: jnp.sum(f(**arguments, causal=False)))
    shapes = list(shapes_in(jax.make_jaxpr(gradients)(arguments(T, S, H, K, 16, 32, 8)).jaxpr))
    assert any(T in shape and S in shape for shape in shapes) is (f is reference)
    assert not any(S in shape and H in shape for shape in shapes)


# That kernels compile for a GPU, as far as the Triton back end of Pallas: this needs none.


def lowered_for_cuda(f, *args):
    """How many kernels the program for an H200 has."""
    try:
        device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    except TypeError:  # before jax 0.11
        device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    kernel = "__gpu$xla.gpu.triton"
    allowed = [jax.export.DisabledSafetyCheck.custom_call(kernel)]
    with use_abstract_mesh(mesh):
        exported = jax.export.export(jax.jit(f), platforms=["cuda"], disabled_checks=allowed)(*args)
    return str(exported.mlir_module()).count(kernel)


def gradient(f, n, **options):
    """Of the first n of a function's arguments."""

    def loss(*args):
        return jnp.sum(f(*args, **options).astype(jnp.float32))

    return jax.grad(loss, argnums=tuple(range(n)))


def with_shared(q, k, v, q_shared_BTHr, k_shared_BSr, ids, segmented, **options):
    ids = {"q_segment_ids_BT": ids, "kv_segment_ids_BS": ids} if segmented else {}
    return flash_attention(q, k, v, q_shared_BTHr=q_shared_BTHr, k_shared_BSr=k_shared_BSr, **ids, **options)


def with_features(q, k, v, frequencies_dF, angles_F, ids, segmented, **options):
    ids = {"q_segment_ids_BT": ids, "kv_segment_ids_BS": ids, "q_rotary_BT": ids, "kv_rotary_BS": ids}
    ids = ids if segmented else {name: x for name, x in ids.items() if "rotary" in name}
    return feature_flash_attention(q, k, v, frequencies_dF, angles_F=angles_F, **ids, **options)


@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_kernels_lower_for_cuda(dtype, causal, segmented):
    S = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((B, 1000, *shape), dtype)
    options = {"causal": causal, "scale": 0.1, "segmented": segmented}
    ids = S(dtype=jnp.int32)
    heads = S(8, 128), S(2, 128), S(2, 96), S(8, 64), S(64), ids
    assert lowered_for_cuda(partial(with_shared, **options), *heads) == 1
    assert lowered_for_cuda(gradient(with_shared, 5, **options), *heads) == 3
    maps = jax.ShapeDtypeStruct((64, 100), jnp.float32), jax.ShapeDtypeStruct((100,), jnp.float32)
    heads = S(8, 64), S(2, 64), S(2, 64), *maps, ids
    assert lowered_for_cuda(partial(with_features, **options), *heads) == 1
    assert lowered_for_cuda(gradient(with_features, 5, **options), *heads) == 3


@pytest.mark.parametrize("name", ARG_SPECS)
def test_kernels_of_model_shapes_lower_for_cuda(name):
    spec = ARG_SPECS[name]
    args = jax.eval_shape(partial(make_args, spec), jax.random.key(0))

    def attend(*arrays):
        return flash_attention(**dict(zip(args, arrays, strict=True)), causal=spec.causal, scale=0.1)

    assert lowered_for_cuda(gradient(attend, len(args)), *args.values()) == 3


WIDTHS = [(width, dtype) for dtype in (jnp.bfloat16, jnp.float32) for width in (32, 256, 320, 384, 512, 768, 1024)]


@pytest.mark.parametrize(("width", "dtype"), [case for case in WIDTHS if case[0] * case[1].dtype.itemsize <= MAX_BYTES])
def test_tiles_fit_the_registers_of_their_warps(width, dtype):
    """Scores and the sums that a tile gathers, in float32, of 255 registers per thread; sizes are powers of two."""
    tiling = default_tiling(width, dtype)
    gathered = {"forward": tiling.forward.t * min(width, MAX_SIZE)}
    gathered |= {"queries": tiling.queries.t * width, "keys": tiling.keys.s * width}
    for name, n in gathered.items():
        tiles = getattr(tiling, name)
        assert all(rows >= 16 and rows & (rows - 1) == 0 for rows in (tiles.t, tiles.s))
        assert n + tiles.t * tiles.s < 255 * 32 * tiles.warps
