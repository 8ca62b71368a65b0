"""Every kind of attention in a block: what it sees, that decoding is the same computation, what it holds.

Legend: B batch, T sequence, S positions decoded at once, D d_model.
"""

from __future__ import annotations

import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BLOCKS, FEATURES, WEIGHING, D, H, block

from stackwise_jax.adapters import init_adapter, merge_adapters
from stackwise_jax.curriculum.phase import AdapterSpec, StackAdapter
from stackwise_jax.kernels import dispatch
from stackwise_jax.memory.quantized import QuantizedTensor, to_format
from stackwise_jax.model import (
    Block,
    KernelSpec,
    MLASpec,
    Stack,
    combine,
    create_simple_rack,
    decode,
    init_cache,
    rack_from_dict,
    rack_to_dict,
    regroup,
    regroup_params,
    split_fixed,
    zero_outputs,
)
from stackwise_jax.model.linear import dense_kernel, project

T = 12
KEY = jax.random.key(0)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiling takes longest
jit = functools.partial(jax.jit, compiler_options=QUICK)
# Their features are made of rotated vectors, so scores depend on differences of positions in expectation only.
RELATIVE_ON_AVERAGE = ("gaussian", "linear"), ("linear", "linear")


def loud(tree):
    """Parameters whose attention matters: the initial output matrix is small."""
    return {**tree, "attn": {**tree["attn"], "o": {"kernel": 5 * tree["attn"]["o"]["kernel"]}}}


def params_of(block: Block):
    return loud(jit(block.init_params)(KEY))


def make_input(batch: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (batch, T, D))


def decoded(block: Block, params, x_BTD, sizes=(4, 4, 4)) -> jax.Array:
    """x through the block with a cache, so many positions at a time."""
    step = jit(lambda params, x, at, cache: block.apply({"params": params}, x, at, cache, method="decode"))
    cache, outputs, start = block.init_cache(x_BTD.shape[0], T + 3, jnp.float32), [], 0
    for size in sizes:
        positions_BS = jnp.broadcast_to(start + jnp.arange(size), (x_BTD.shape[0], size))
        y_BSD, cache = step(params, x_BTD[:, start : start + size], positions_BS, cache)
        outputs.append(y_BSD)
        start += size
    return jnp.concatenate(outputs, axis=1)


def full(block: Block, params, x_BTD, **how) -> jax.Array:
    return jit(lambda params, x_BTD: block.apply({"params": params}, x_BTD, **how))(params, x_BTD)


@pytest.mark.parametrize("name", BLOCKS)
def test_decoding_equals_the_full_forward(name):
    block, x_BTD = BLOCKS[name], make_input()
    params = params_of(block)
    whole_BTD = full(block, params, x_BTD)
    np.testing.assert_allclose(decoded(block, params, x_BTD), whole_BTD, atol=2e-5)
    silent = {**params, "attn": {**params["attn"], "o": {"kernel": jnp.zeros_like(params["attn"]["o"]["kernel"])}}}
    assert np.abs(full(block, silent, x_BTD) - whole_BTD).max() > 0.1


@pytest.mark.parametrize("name", BLOCKS)
def test_nothing_leaks_over_time_or_segments(name):
    """By gradient: how output row t depends on input row s."""
    block, x_TD = BLOCKS[name], make_input()[0]
    params, ids_T = params_of(block), np.repeat([1, 2, 3, 0], T // 4)
    same_TT = (ids_T[:, None] == ids_T[None]) & (ids_T[:, None] != 0)
    for mode in ("causal", "bidirectional"):
        run = lambda x_TD, mode=mode: block.apply({"params": params}, x_TD[None], None, ids_T[None], mode)[0]
        influence_TT = np.abs(jit(jax.jacobian(run))(x_TD)).max(axis=(1, 3))
        seen_TT = same_TT & (np.tri(T, dtype=bool) if mode == "causal" else True) | np.eye(T, dtype=bool)
        np.testing.assert_array_equal(influence_TT > 0, seen_TT)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_packed_document_is_computed_as_if_it_stood_alone_and_wherever_it_stands(name):
    block, x_BTD, half = BLOCKS[name], make_input(), T // 2
    params, kernel = params_of(block), block.kernel
    positions_BT, ids_BT = np.tile(np.arange(half), 2)[None], np.repeat([[1, 2]], half, axis=1).repeat(2, axis=0)
    run = jit(lambda x_BTD, at_BT, ids_BT: block.apply({"params": params}, x_BTD, at_BT, ids_BT))
    packed_BTD = run(x_BTD, positions_BT, ids_BT)
    alone = [full(block, params, x_BtD) for x_BtD in (x_BTD[:, :half], x_BTD[:, half:])]
    np.testing.assert_allclose(packed_BTD, jnp.concatenate(alone, axis=1), atol=2e-5)
    if kernel is None or (kernel.type, kernel.mode) not in RELATIVE_ON_AVERAGE:
        np.testing.assert_allclose(run(x_BTD, positions_BT + 100, ids_BT), packed_BTD, atol=1e-3)
    assert np.abs(run(x_BTD, 3 * positions_BT, ids_BT) - packed_BTD).max() > 1e-3


@pytest.mark.parametrize("name", BLOCKS)
def test_the_tree_is_what_the_spec_says(name):
    block = BLOCKS[name]
    shapes = jax.eval_shape(block.init_params, KEY)
    held = {key: leaf["kernel"].shape for key, leaf in shapes["attn"].items() if "kernel" in leaf}
    assert held | {key: leaf["kernel"].shape for key, leaf in shapes["mlp"].items()} == block.matrices
    sizes = jax.tree.map(lambda leaf: leaf.size, shapes)
    assert block.parameter_count() == sum(jax.tree.leaves(sizes))
    fixed = [sizes["mlp"]["up"], sizes["attn"].get("features", {})]
    assert block.parameter_count() - block.parameter_count(True) == sum(jax.tree.leaves(fixed))
    rack = create_simple_rack(1, 1, D, 24, H, 8, **{key: getattr(block, key) for key in ("attention_type", "mla")})
    stack = Stack((block,), parent=None)
    again = rack_from_dict(json.loads(json.dumps(rack_to_dict(rack.clone(stacks=(stack,), parent=None)))))
    assert again.stacks[0].blocks[0] == block and hash(again.stacks[0].blocks[0]) == hash(block)


def test_multi_head_and_grouped_attention_are_told_apart_by_their_heads():
    assert block("gqa", n_kv_heads=4) == block("mha") != block("mha", n_kv_heads=2) == block("gqa", n_kv_heads=2)
    sizes = [MLASpec(rq=None, rkv=7, nope_dim=n, rope_dim=2, v_dim=3) for n in (4, 5)]
    low, other = (block("low_rank", mla=size) for size in sizes)
    assert low == other and block("mla", mla=sizes[0]) != block("mla", mla=sizes[1])
    assert (block("gqa").attention_type, block("mha", n_kv_heads=2).attention_type) == ("mha", "gqa")


def test_grouped_latent_attention_is_that_with_repeated_heads():
    grouped, whole, x_BTD = block("mla", n_kv_heads=2), block("mla"), make_input()
    params = params_of(grouped)
    kv_b = params["attn"]["kv_b"]["kernel"].reshape(10, 2, 11)
    attn = {**params["attn"], "kv_b": {"kernel": jnp.repeat(kv_b, 2, axis=1).reshape(10, 44)}}
    np.testing.assert_allclose(full(grouped, params, x_BTD), full(whole, {**params, "attn": attn}, x_BTD), atol=1e-5)


def test_low_rank_attention_is_full_attention_with_products_of_its_factors():
    low, whole, x_BTD = block("low_rank", n_kv_heads=2), block(n_kv_heads=2), make_input()
    params = params_of(low)
    product = lambda name: params["attn"][f"{name}_a"]["kernel"] @ params["attn"][f"{name}_b"]["kernel"]
    attn = {name: {"kernel": product(name)} for name in "qkv"} | {"o": params["attn"]["o"]}
    np.testing.assert_allclose(full(low, params, x_BTD), full(whole, {**params, "attn": attn}, x_BTD), atol=1e-5)


def test_latent_attention_without_rope_has_no_rotary_part():
    still = block("mla", use_rope=False)
    assert still.matrices["q"] == (D, 4 * 6) and still.matrices["kv_a"] == (D, 10)
    params, x_BTD = params_of(still), make_input()
    assert set(still.init_cache(2, T, jnp.float32)) == {"latent"}
    np.testing.assert_allclose(decoded(still, params, x_BTD), full(still, params, x_BTD), atol=1e-5)
    run = jit(lambda at_BT: still.apply({"params": params}, x_BTD, at_BT))
    np.testing.assert_array_equal(run(jnp.arange(T)[None]), run(7 * jnp.arange(T)[None]))


@pytest.mark.parametrize("name", ["mla, products, 2 to a group", "mla, softmax, 2 to a group", "laplacian, softmax"])
def test_decoding_in_bf16_stays_near_the_forward_in_bf16(name):
    given, x_BTD = BLOCKS[name].clone(compute_dtype="bf16", parent=None), make_input()
    params = params_of(given)
    whole_BTD, exact_BTD = full(given, params, x_BTD), full(BLOCKS[name], params, x_BTD)
    assert whole_BTD.dtype == jnp.bfloat16
    rounding = np.abs(whole_BTD - exact_BTD).max()
    assert np.abs(decoded(given, params, x_BTD) - whole_BTD).max() < 2 * rounding < 0.2


@pytest.mark.parametrize("name", ["mla, products, 2 to a group", "laplacian, softmax", "gaussian, linear"])
def test_all_implementations_agree_and_what_is_not_here_gives_way(name, monkeypatch, caplog):
    monkeypatch.setattr("stackwise_jax.kernels.attention.chunked.MAX_SCORES", 5 * T)  # several chunks, the last padded
    monkeypatch.setattr("stackwise_jax.kernels.linear_attention.chunked.CHUNK", 5)
    given, x_BTD = BLOCKS[name], make_input()
    params = params_of(given)
    expected_BTD = full(given, params, x_BTD)
    own = "reference" if given.kernel is None or given.kernel.mode == "softmax" else "chunked"  # what auto takes
    monkeypatch.setattr(dispatch, "cuda_capability", lambda: None)
    for asked in {"reference", "chunked", "cudnn", "pallas"} - {own}:
        dispatch._log_once.cache_clear()
        with caplog.at_level(logging.WARNING, "stackwise_jax"):
            other_BTD = full(given.clone(attention_implementation=asked, parent=None), params, x_BTD)
        np.testing.assert_allclose(other_BTD, expected_BTD, atol=1e-5, err_msg=asked)
        said = [record.getMessage() for record in caplog.records]
        assert [f"{own} instead of {asked}" in line for line in said] == [True] * (asked in ("cudnn", "pallas"))
        caplog.clear()


# What decoding keeps.


def test_caches_are_as_small_as_each_kind_allows():
    def shapes(kind, kernel=None):
        return jax.tree.map(jnp.shape, block(kind, kernel, 2).init_cache(3, 50, jnp.bfloat16))

    assert shapes("mha") == {"k": (3, 50, 2, 4), "v": (3, 50, 2, 4)}
    assert shapes("mha", WEIGHING["softmax"]) == {"k": (3, 50, 2, FEATURES), "v": (3, 50, 2, 4)}
    assert shapes("mla") == {"latent": (3, 50, 10), "rope": (3, 50, 4)}
    assert shapes("mla", WEIGHING["softmax"]) == {"latent": (3, 50, 10)}
    for kind, e in (("mha", 4), ("mla", 5), ("low_rank", 4)):
        assert tuple(shapes(kind, WEIGHING["linear"])) == ((3, 2, FEATURES, e), (3, 2, FEATURES))


@pytest.mark.parametrize("name", [f"{kind}, 2 to a group" for kind in ("mha, linear", "mla, linear", "mla, products")])
def test_padding_and_what_is_decoded_again_leave_no_trace(name):
    """A prompt padded to a common length, its last token decoded once more: as sampling does it, rows of their own."""
    given = BLOCKS[name]
    rack = create_simple_rack(1, 2, D, 24, H, 50, attention_preset="gpt_style")
    rack = rack.clone(stacks=(Stack((given, given), parent=None),), parent=None)
    params = jit(rack.init_params)(KEY)
    tokens_BT, lengths_B = jax.random.randint(jax.random.key(2), (2, T), 0, 50), jnp.asarray([5, 9])
    full_BTV = jit(lambda params: rack.apply({"params": params}, tokens_BT))(params)
    step = jax.jit(functools.partial(decode, rack))
    at_BS = jnp.broadcast_to(jnp.arange(10), (2, 10))
    valid_BS = at_BS < lengths_B[:, None] - 1
    padded_BS = jnp.where(at_BS < lengths_B[:, None], tokens_BT[:, :10], 0)
    _, caches = step(params, padded_BS, at_BS, init_cache(rack, 2, T), valid_BS=valid_BS)
    for shift in (-1, 0, 1):
        at_B1 = lengths_B[:, None] + shift
        logits_B1V, caches = step(params, jnp.take_along_axis(tokens_BT, at_B1, axis=1), at_B1, caches)
        np.testing.assert_allclose(logits_B1V[:, 0], full_BTV[jnp.arange(2), at_B1[:, 0]], atol=2e-5)


# What knows the matrices of a block.


def adapted(given: Block, params, **spec):
    adapter = StackAdapter(stack=0, name="stack", spec=AdapterSpec(**{"rank": 3, "alpha": 6.0, **spec}))
    tree = init_adapter(Stack((given,)), adapter, 0, KEY)
    stacked = {"blocks": jax.tree.map(lambda leaf: leaf[None], params)}
    learned = jax.tree_util.tree_map_with_path(lambda path, x: x + 0.1 if path[-1].key == "b" else x, tree)
    return stacked, learned


def first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree["blocks"])


@pytest.mark.parametrize("kind", ["mla", "low_rank"])
def test_adapters_sit_on_all_matrices_and_merge_into_them(kind):
    given, x_BTD = block(kind, n_kv_heads=2), make_input()
    stacked, adapters = adapted(given, params_of(given))
    assert set(adapters["blocks"]["attn"]) == set(given.matrices) - {"gate", "up", "down"}
    with_adapters = first(combine(stacked, adapters))
    wanted_BTD = full(given, with_adapters, x_BTD)
    assert np.abs(wanted_BTD - full(given, first(stacked), x_BTD)).max() > 0.1
    np.testing.assert_allclose(full(given, first(merge_adapters(stacked, adapters)), x_BTD), wanted_BTD, atol=2e-5)
    np.testing.assert_allclose(decoded(given, with_adapters, x_BTD), wanted_BTD, atol=2e-5)


def test_adapters_may_sit_on_some_matrices():
    given = block("mla")
    _, adapters = adapted(given, params_of(given), targets=("kv_b", "down"))
    assert {part: set(tree) for part, tree in adapters["blocks"].items()} == {"attn": {"kv_b"}, "mlp": {"down"}}


@pytest.mark.parametrize(("bound", "fmt"), [(0.8, "fp32"), (0.0, "int8"), (0.8, "nf4")])
def test_the_absorbed_matrix_is_the_one_that_is_multiplied_with(bound, fmt):
    given, x_BTD = block("mla", spectral_norm=bound), make_input()
    params = to_format(params_of(given), fmt)
    assert isinstance(params["attn"]["kv_b"]["kernel"], QuantizedTensor) == (fmt != "fp32")
    latent_BTC = jax.random.normal(jax.random.key(3), (2, T, 10))
    product_BTI = project(given, params["attn"], "kv_b", latent_BTC)
    np.testing.assert_allclose(latent_BTC @ dense_kernel(given, params["attn"], "kv_b"), product_BTI, atol=1e-5)
    np.testing.assert_allclose(decoded(given, params, x_BTD), full(given, params, x_BTD), atol=2e-5)


def test_small_adapters_on_the_absorbed_matrix_survive_in_bf16():
    given = block("mla").clone(param_dtype="bf16", compute_dtype="bf16", parent=None)
    plain = params_of(given)["attn"]
    update = {"a": jnp.full((10, 1), 1e-2), "b": jnp.full((1, 44), 1e-2), "scale": jnp.ones(())}
    adapted = {**plain, "kv_b": {**plain["kv_b"], "adapters": {"trunk": update}}}
    change = dense_kernel(given, adapted, "kv_b").astype(jnp.float32) - dense_kernel(given, plain, "kv_b")
    np.testing.assert_allclose(change, 1e-4, rtol=1e-2)


def test_adapters_decode_in_bf16_as_they_compute():
    given, x_BTD = block("mla", n_kv_heads=2).clone(compute_dtype="bf16", parent=None), make_input()
    params = params_of(given)
    params = first(combine(*adapted(given, params)))
    whole_BTD, step_BTD = full(given, params, x_BTD), decoded(given, params, x_BTD)
    exact_BTD = full(given.clone(compute_dtype="fp32", parent=None), params, x_BTD)
    assert whole_BTD.dtype == step_BTD.dtype == jnp.bfloat16
    assert np.abs(step_BTD - whole_BTD).max() < 2 * np.abs(whole_BTD - exact_BTD).max() < 0.3


def test_sizes_that_are_not_used_tell_no_blocks_apart():
    kernel, sizes = KernelSpec("cauchy"), [MLASpec(None, 8, 4, rope, 4) for rope in (2, 8)]
    assert block("mla", kernel, mla=sizes[0]) == block("mla", kernel, mla=sizes[1])
    assert block("mla", mla=sizes[0]) != block("mla", mla=sizes[1])


def test_norms_and_random_matrices_stay_dense_and_fixed():
    given = block("mla", KernelSpec("cauchy", "softmax", features=FEATURES), mla=MLASpec(8, 10, 6, 4, 5))
    stack = Stack((given, given))
    params = jit(stack.init_params)(KEY)
    short = to_format(params, "nf4")["blocks"]
    quantized = {name for name, leaf in short["attn"].items() if isinstance(leaf.get("kernel"), QuantizedTensor)}
    assert quantized == {"q_a", "q_b", "kv_a", "kv_b", "o"}
    for name, leaf in (("q_norm", "scale"), ("kv_norm", "scale"), ("features", "matrix")):
        np.testing.assert_array_equal(short["attn"][name][leaf], params["blocks"]["attn"][name][leaf])
    learnable, fixed = split_fixed(stack, params)
    assert jax.tree.map(jnp.shape, fixed) == {
        "blocks": {"mlp": {"up": {"kernel": (2, D, 24)}}, "attn": {"features": {"matrix": (2, 6, FEATURES // 2)}}}
    }
    assert jax.tree.structure(combine(learnable, fixed)) == jax.tree.structure(params)
    learning = given.clone(kernel=KernelSpec("cauchy", "softmax", FEATURES, learn=True), parent=None)
    assert set(split_fixed(Stack((learning,)), params)[1]["blocks"]) == {"mlp"}
    a, b = params["blocks"]["attn"]["features"]["matrix"]
    assert np.abs(a - b).max() > 0.1  # each block draws its own


def test_stacks_of_any_attention_are_regrouped_split_and_silenced():
    given = block("mla", KernelSpec("laplacian", features=FEATURES), 2)
    rack = create_simple_rack(2, 2, D, 24, H, 50)
    rack = rack.clone(stacks=tuple(Stack((given,) * 2, i, parent=None) for i in range(2)), parent=None)
    params, tokens_BT = jit(rack.init_params)(KEY), jnp.arange(T)[None]
    other, moved = regroup(rack, (1, 3)), regroup_params(rack, params, (1, 3))
    run = lambda rack, params: jit(lambda params: rack.apply({"params": params}, tokens_BT))(params)
    np.testing.assert_allclose(run(other, moved), run(rack, params), atol=1e-5)
    back = regroup_params(other, moved, (2, 2))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    x_BTD, stack = make_input(), rack.stacks[0]
    silent = zero_outputs(stack, params["stacks"]["000"])
    np.testing.assert_array_equal(stack.apply({"params": silent}, x_BTD), x_BTD)


def test_dropout_of_adapters_acts_on_every_matrix():
    given, x_BTD = block("low_rank"), make_input()
    stacked, adapters = adapted(given, params_of(given), dropout=0.5)
    params = first(combine(stacked, adapters))
    run = jit(lambda key: given.apply({"params": params}, x_BTD, dropout_key=key))
    assert np.abs(run(jax.random.key(0)) - run(jax.random.key(1))).max() > 0.01
