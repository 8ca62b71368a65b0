"""Stacks and racks: scan and unrolled, remat, caches for decoding, parameters, unlike stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stackwise_jax import model
from stackwise_jax.errors import UsageError
from stackwise_jax.model import (
    Block,
    Rack,
    Stack,
    combine,
    create_block_spec,
    create_rack_from_specs,
    create_simple_rack,
    split_fixed,
)

D, T, V = 32, 16, 50
BLOCK = Block(d_model=D, d_ff=48, n_heads=4, n_kv_heads=2)
OTHER = Block(d_model=D, d_ff=64, n_heads=4, n_kv_heads=2, attention_mode="bidirectional", freeze_up_proj=False)


def make_input() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, T, D))


def make_tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(2), (2, T), 0, V)


def make_rack(**changes) -> Rack:
    given = {"attention_preset": "gpt_style", "n_kv_heads": 2, **changes}
    return create_simple_rack(3, 2, D, 48, 4, V, **given)


def run(module, params, *args, **kwargs) -> jax.Array:
    """The module applied to a tree, in one program."""
    changing = {name: value for name, value in kwargs.items() if isinstance(value, jax.Array)}
    static = {name: value for name, value in kwargs.items() if name not in changing}
    return jax.jit(lambda params, *args, **more: module.apply({"params": params}, *args, **static, **more))(
        params, *args, **changing
    )


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_near_trees(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance), a, b)


def layers(params, count):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(count)]


def test_scan_equals_blocks_one_after_another():
    stack, x_BTD = Stack((BLOCK,) * 3), make_input()
    params = stack.init_params(jax.random.key(0))
    expected_BTD = x_BTD
    for block_params in layers(params, 3):
        expected_BTD = run(BLOCK, block_params, expected_BTD)
    np.testing.assert_allclose(run(stack, params, x_BTD), expected_BTD, atol=1e-5)


def test_unlike_blocks_are_unrolled():
    stack, x_BTD = Stack((BLOCK, OTHER)), make_input()
    assert not stack.block_alike and Stack((BLOCK,) * 2).block_alike
    params = stack.init(jax.random.key(0), x_BTD)["params"]
    assert set(params) == {"block_000", "block_001"}
    expected_BTD = run(BLOCK, params["block_000"], x_BTD)
    expected_BTD = run(OTHER, params["block_001"], expected_BTD)
    np.testing.assert_array_equal(run(stack, params, x_BTD), expected_BTD)
    jaxpr = jax.make_jaxpr(lambda params: stack.apply({"params": params}, x_BTD))(params)
    assert "scan" not in str(jaxpr)


@pytest.mark.parametrize("blocks", [(BLOCK,) * 3, (BLOCK, OTHER)])
def test_remat_gives_equal_gradients_and_recomputes(blocks):
    x_BTD, params = make_input(), Stack(blocks).init_params(jax.random.key(0))

    def gradients(remat):
        stack = Stack(blocks, remat=remat)

        def loss(params, x_BTD):
            return jnp.sum(jnp.square(stack.apply({"params": params}, x_BTD)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x_BTD), jax.make_jaxpr(jax.grad(loss))

    (plain, _), (rematted, jaxpr) = gradients(False), gradients(True)
    assert_near_trees(plain, rematted, 1e-4)
    assert "remat" in str(jaxpr(params, x_BTD)) or "checkpoint" in str(jaxpr(params, x_BTD))


@pytest.mark.parametrize("blocks", [(BLOCK,) * 2, (BLOCK, OTHER)])
def test_decoding_with_a_cache_equals_the_full_forward(blocks):
    stack, x_BTD = Stack(blocks), make_input()
    params = stack.init_params(jax.random.key(0))
    full_BTD = run(stack, params, x_BTD, attention_mode="causal")
    step = jax.jit(lambda x, positions, cache: run(stack, params, x, positions, cache, method="decode"))
    cache, outputs, start = stack.init_cache(2, T + 5), [], 0
    for size in (7, 1, 1, 5, 2):  # a prompt at once, then a few at a time
        positions_BS = jnp.broadcast_to(start + jnp.arange(size), (2, size))
        y_BSD, cache = step(x_BTD[:, start : start + size], positions_BS, cache)
        outputs.append(y_BSD)
        start += size
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), full_BTD, atol=1e-5)


def test_rows_may_decode_at_positions_of_their_own():
    rack, tokens_BT = make_rack(), make_tokens()
    params = rack.init_params(jax.random.key(0))
    full_BTV = run(rack, params, tokens_BT)
    lengths_B = jnp.asarray([5, 9])
    caches = model.init_cache(rack, 2, T)
    prompt_positions_BS = jnp.broadcast_to(jnp.arange(9), (2, 9))
    _, caches = model.decode(rack, params, tokens_BT[:, :9], prompt_positions_BS, caches)
    next_B1 = jnp.take_along_axis(tokens_BT, lengths_B[:, None], axis=1)
    logits_B1V, _ = model.decode(rack, params, next_B1, lengths_B[:, None], caches)
    np.testing.assert_allclose(logits_B1V[:, 0], full_BTV[jnp.arange(2), lengths_B], atol=1e-5)


def test_decode_goes_to_a_depth():
    rack, tokens_BT = make_rack(compute_dtype="bf16"), make_tokens()
    params = rack.init_params(jax.random.key(0))
    caches = model.init_cache(rack, 2, T, depth=1)
    assert len(caches) == 1 and caches[0]["k"].shape == (2, 2, T, 2, 8) and caches[0]["k"].dtype == jnp.bfloat16
    positions_BS = jnp.broadcast_to(jnp.arange(T), (2, T))
    logits_BTV, _ = model.decode(rack, params, tokens_BT, positions_BS, caches, depth=1)
    np.testing.assert_allclose(logits_BTV, run(rack, params, tokens_BT, depth=1), atol=2e-2)


def test_dropout_keys_are_folded_per_block():
    blocks, x_BTD = (BLOCK.clone(dropout=0.3),) * 2, make_input()
    stack = Stack(blocks)
    params, key = stack.init_params(jax.random.key(0)), jax.random.key(7)
    whole_BTD = run(stack, params, x_BTD, dropout_key=key)
    parts_BTD = x_BTD
    for i, block_params in enumerate(layers(params, 2)):
        parts_BTD = run(blocks[0], block_params, parts_BTD, dropout_key=jax.random.fold_in(key, i))
    np.testing.assert_allclose(whole_BTD, parts_BTD, atol=1e-5)
    shifted_BTD = run(stack, params, x_BTD, dropout_key=key, first_block=2)
    assert np.abs(shifted_BTD - whole_BTD).max() > 0.01


@pytest.mark.parametrize("tie", [True, False])
def test_rack_init_and_apply_are_the_plain_functions(tie):
    rack, tokens_BT, key = make_rack(tie_embeddings=tie), make_tokens(), jax.random.key(3)
    params = rack.init(key, tokens_BT)["params"]
    assert set(params) == {"embed", "stacks", "head"} and set(params["stacks"]) == {"000", "001", "002"}
    assert ("kernel" in params["head"]) == (not tie)
    assert_equal_trees(params["embed"], model.init_embed(rack, key))
    assert_equal_trees(params["head"], model.init_head(rack, key))
    for i in range(3):
        assert_equal_trees(params["stacks"][model.stack_name(i)], model.init_stack(rack, i, key))

    @jax.jit
    def by_parts(params, tokens_BT):
        x_BTD = model.embed_tokens(rack, params["embed"], tokens_BT)
        x_BTD = model.run_stacks(rack.stacks, [params["stacks"][model.stack_name(i)] for i in range(3)], x_BTD)
        return model.logits(rack, params["head"], params["embed"], x_BTD)

    whole_BTV = jax.jit(rack.apply)({"params": params}, tokens_BT)
    assert whole_BTV.dtype == jnp.float32 and whole_BTV.shape == (2, T, V)
    np.testing.assert_array_equal(whole_BTV, by_parts(params, tokens_BT))
    kernel_DV = model.head_kernel(rack, params["head"], params["embed"])
    np.testing.assert_array_equal(kernel_DV, params["embed"]["embedding"].T if tie else params["head"]["kernel"])
    x_BTD = make_input()
    hidden_BTD = model.final_hidden(rack, params["head"], x_BTD)
    logits_BTV = model.logits(rack, params["head"], params["embed"], x_BTD)
    np.testing.assert_allclose(hidden_BTD @ kernel_DV, logits_BTV, atol=1e-5)


@pytest.mark.parametrize(("tie", "embed_std"), [(True, 0.03), (False, 0.03 * D**0.5)])
def test_initial_scale_of_embedding_and_head(tie, embed_std):
    rack = create_simple_rack(1, 1, D, 48, 4, 512, tie_embeddings=tie, init_std=0.03)
    embedding = model.init_embed(rack, jax.random.key(0))["embedding"]
    np.testing.assert_allclose(jnp.std(embedding), embed_std, rtol=0.02)
    if not tie:
        kernel_DV = model.init_head(rack, jax.random.key(0))["kernel"]
        np.testing.assert_allclose(jnp.std(kernel_DV), 0.03, rtol=0.02)
        assert abs(np.corrcoef(kernel_DV.T.ravel(), embedding.ravel())[0, 1]) < 0.05


def test_stack_init_gives_the_documented_tree():
    stack = Stack((BLOCK,) * 3)
    params = stack.init(jax.random.key(0), make_input())["params"]
    assert set(params) == {"blocks"} and params["blocks"]["attn"]["q"]["kernel"].shape == (3, D, D)
    assert_equal_trees(params, stack.init_params(jax.random.key(0)))
    kernels = params["blocks"]["mlp"]["up"]["kernel"]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1


def test_initial_blocks_do_not_depend_on_the_grouping():
    key, flat = jax.random.key(5), []
    for n_stacks, size in [(3, 2), (6, 1), (1, 6)]:
        rack = create_simple_rack(n_stacks, size, D, 48, 4, V)
        flat.append(model.concat_blocks([model.init_stack(rack, i, key) for i in range(n_stacks)]))
    assert_equal_trees(flat[0], flat[1])
    assert_equal_trees(flat[0], flat[2])


def test_depth_stops_early_and_is_checked():
    rack, tokens_BT = make_rack(), make_tokens()
    params = rack.init_params(jax.random.key(0))
    short = create_simple_rack(1, 2, D, 48, 4, V, attention_preset="gpt_style", n_kv_heads=2)
    kept = {**params, "stacks": {"000": params["stacks"]["000"]}}
    expected_BTV = run(short, kept, tokens_BT)
    np.testing.assert_array_equal(run(rack, params, tokens_BT, depth=1), expected_BTV)
    np.testing.assert_array_equal(run(rack, kept, tokens_BT, depth=1), expected_BTV)
    for depth in (0, 4):
        with pytest.raises(UsageError, match=f"depth is {depth}; write 1 to 3"):
            run(rack, params, tokens_BT, depth=depth)


@pytest.mark.parametrize("tie", [True, False])
def test_parameter_count_is_the_actual_count(tie):
    spec = create_block_spec(D, 48, 4)
    frozen = {"n_blocks": 1, "block_spec": OTHER, "freeze_blocks": True}
    rack = create_rack_from_specs(V, D, [{"n_blocks": 2, "block_spec": spec}, frozen], tie_embeddings=tie)
    params = rack.init(jax.random.key(0), make_tokens())["params"]
    assert rack.parameter_count() == model.size_of(params)
    learnable, fixed = split_fixed(rack.stacks[0], params["stacks"]["000"])
    assert model.size_of(fixed) == 2 * D * 48
    ends = model.size_of(params["embed"]) + model.size_of(params["head"])
    assert rack.parameter_count(trainable_only=True) == ends + model.size_of(learnable)
    assert rack.stacks[1].parameter_count() == model.size_of(params["stacks"]["001"])
    assert rack.stacks[1].parameter_count(trainable_only=True) == 0


@pytest.mark.parametrize("blocks", [(BLOCK,) * 2, (BLOCK, OTHER), (OTHER,)])
def test_split_fixed_takes_the_frozen_up_projections_and_combine_returns_them(blocks):
    stack = Stack(blocks)
    params = stack.init_params(jax.random.key(0))
    learnable, fixed = split_fixed(stack, params)
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(fixed)[0]}
    assert all("['mlp']['up']['kernel']" in name for name in names)
    assert len(names) == (0 if blocks == (OTHER,) else 1)
    assert_equal_trees(combine(learnable, fixed), params)
    assert_equal_trees(combine(fixed, learnable), params)
    with pytest.raises(ValueError, match="both trees hold"):
        combine(params, learnable)


def test_frozen_up_projection_is_reproducible_from_the_seed_alone():
    key = jax.random.key(11)
    frozen, free = (make_rack(freeze_up_proj=flag) for flag in (True, False))
    up = lambda rack: model.init_stack(rack, 1, key)["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(up(frozen), up(free))
    assert (
        np.abs(up(frozen) - model.init_stack(frozen, 1, jax.random.key(12))["blocks"]["mlp"]["up"]["kernel"]).max() > 0
    )


def test_encoder_stack_then_decoder_stack():
    encoder = create_block_spec(D, 48, 4, attention_mode="bidirectional")
    decoder = create_block_spec(D, 64, 4, 2, attention_mode="causal")
    rack = create_rack_from_specs(
        V,
        D,
        [{"stack_id": 0, "n_blocks": 2, "block_spec": encoder}, {"stack_id": 1, "n_blocks": 1, "block_spec": decoder}],
    )
    assert [stack.blocks[0].attention_mode for stack in rack.stacks] == ["bidirectional", "causal"]
    params = rack.init(jax.random.key(0), make_tokens())["params"]

    def last_of_first(stack_name):
        """How the first output row depends on the last input row of one stack."""
        stack = rack.stacks[int(stack_name)]

        def first_row(x_BTD):
            return run(stack, params["stacks"][stack_name], x_BTD)[:, 0].sum()

        return np.abs(jax.grad(first_row)(make_input())[:, -1]).max()

    assert last_of_first("000") > 0 and last_of_first("001") == 0
    assert run(rack, params, make_tokens()).shape == (2, T, V)


def test_rack_passes_on_segments_positions_mode_and_dropout():
    rack, tokens_BT = make_rack(dropout=0.2), make_tokens()
    params = rack.init_params(jax.random.key(0))
    plain_BTV = run(rack, params, tokens_BT)
    for changed in (
        {"segment_ids_BT": jnp.repeat(jnp.asarray([[1, 2]] * 2), T // 2, axis=1)},
        {"positions_BT": 3 * jnp.arange(T)[None]},
        {"attention_mode": "bidirectional"},
        {"dropout_key": jax.random.key(0)},
    ):
        assert np.abs(run(rack, params, tokens_BT, **changed) - plain_BTV).max() > 1e-4, changed


def test_bf16_rack_has_float32_logits_near_those_of_fp32():
    tokens_BT = make_tokens()
    exact, short = make_rack(), make_rack(compute_dtype="bf16")
    params = exact.init_params(jax.random.key(0))
    assert model.embed_tokens(short, params["embed"], tokens_BT).dtype == jnp.bfloat16
    logits_BTV = run(short, params, tokens_BT)
    assert logits_BTV.dtype == jnp.float32
    np.testing.assert_allclose(logits_BTV, run(exact, params, tokens_BT), atol=0.03)
    for dtype, expected in ((None, jnp.bfloat16), (jnp.float32, jnp.float32)):
        assert {x.dtype for x in jax.tree.leaves(model.init_cache(short, 2, T, dtype))} == {jnp.dtype(expected)}


def test_blocks_of_neighbouring_stacks_drop_by_their_place_among_all():
    rack, x_BTD, key = make_rack(dropout=0.3), make_input(), jax.random.key(4)
    params = rack.init_params(jax.random.key(0))["stacks"]
    trees = [params[model.stack_name(i)] for i in range(3)]
    found_BTD = model.run_stacks(rack.stacks, trees, x_BTD, dropout_key=key)
    for i, (stack, tree) in enumerate(zip(rack.stacks, trees, strict=True)):
        x_BTD = stack.apply({"params": tree}, x_BTD, dropout_key=key, first_block=2 * i)
    np.testing.assert_array_equal(found_BTD, x_BTD)


def test_racks_are_static_arguments_equal_by_value():
    traces = []

    def traced(rack, params, tokens_BT):
        traces.append(rack)
        return rack.apply({"params": params}, tokens_BT)

    jitted, tokens_BT = jax.jit(traced, static_argnums=0), make_tokens()
    params = make_rack().init_params(jax.random.key(0))
    first = jitted(make_rack(), params, tokens_BT)
    np.testing.assert_array_equal(first, jitted(make_rack(), params, tokens_BT))
    assert len(traces) == 1
    assert make_rack().stacks[2].blocks[1] == make_rack().stacks[0].blocks[0]


def test_a_rack_learns():
    rack, tokens_BT = make_rack(), make_tokens()
    params = rack.init_params(jax.random.key(0))
    optimizer = optax.adam(1e-2)

    def loss(params):
        logits_BTV = rack.apply({"params": params}, tokens_BT[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:]).mean()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(30):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert abs(losses[0] - np.log(V)) < 0.3 and losses[-1] < 0.5


def test_impossible_stacks_and_racks_say_what_to_write():
    narrow = Block(d_model=16, d_ff=16, n_heads=2)
    with pytest.raises(UsageError, match="blocks_per_stack >= 1"):
        Stack(())
    with pytest.raises(UsageError, match=r"widths \[16, 32\]"):
        Stack((BLOCK, narrow))
    with pytest.raises(UsageError, match="n_stacks >= 1"):
        Rack((), V, D)
    with pytest.raises(UsageError, match="stack 1 has d_model 16 in a rack of 32"):
        Rack((Stack((BLOCK,)), Stack((narrow,))), V, D)
    with pytest.raises(UsageError, match=r"model\.vocab_size is 0"):
        Rack((Stack((BLOCK,)),), 0, D)
