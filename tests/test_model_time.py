"""The time embedding: what it adds, that it learns, and that a rack without it is what it was.

Legend: B batch, T sequence, D d_model, F features, V vocabulary.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stackwise_jax import model
from stackwise_jax.errors import UsageError
from stackwise_jax.model import Rack, create_rack_from_config, create_rack_from_specs, create_simple_rack
from stackwise_jax.model.time import INTERVALS, time_features

D, T, V = 16, 8, 30
KINDS = ("sinusoidal", "learned")
NAMES = {"sinusoidal": "kernel", "learned": "table"}
ROOT = jax.random.key(0)


def make_rack(time_embedding="none", **changes) -> Rack:
    given = {"attention_preset": "gpt_style", "tie_embeddings": False, **changes}
    return create_simple_rack(2, 1, D, 24, 2, V, time_embedding=time_embedding, **given)


def make_tokens(batch=3) -> jax.Array:
    return jax.random.randint(jax.random.key(2), (batch, T), 0, V)


def at_random(params) -> dict:
    """The same parameters with a time embedding that has learned something."""
    time = jax.tree.map(lambda x: jax.random.normal(jax.random.key(5), x.shape, x.dtype), params["embed"]["time"])
    return {**params, "embed": {**params["embed"], "time": time}}


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_it_only_adds_its_own_leaf_and_starts_at_zero(kind):
    plain, timed = make_rack(), make_rack(kind)
    params, tokens_BT = timed.init_params(ROOT), make_tokens()
    time = params["embed"].pop("time")
    assert_equal_trees(params, plain.init_params(ROOT))
    assert set(time) == {NAMES[kind]}
    matrix_FD = time[NAMES[kind]]
    assert matrix_FD.shape == (64 if kind == "sinusoidal" else INTERVALS + 1, D) and matrix_FD.dtype == jnp.float32
    assert timed.parameter_count() == plain.parameter_count() + matrix_FD.size
    logits_BTV = plain.apply({"params": params}, tokens_BT)
    params["embed"]["time"] = time
    hidden_B = jnp.array([0.0, 0.3, 1.0])
    np.testing.assert_array_equal(timed.apply({"params": params}, tokens_BT, hidden_B=hidden_B), logits_BTV)


@pytest.mark.parametrize("kind", KINDS)
def test_one_vector_per_sequence_is_added_at_every_position(kind):
    rack, tokens_BT, hidden_B = make_rack(kind), make_tokens(), jnp.array([0.0, 0.3, 1.0])
    embed = at_random(rack.init_params(ROOT))["embed"]
    plain_BTD = embed["embedding"][tokens_BT]
    added_BTD = model.embed_tokens(rack, embed, tokens_BT, hidden_B) - plain_BTD
    expected_BD = time_features(kind, hidden_B) @ embed["time"][NAMES[kind]]
    np.testing.assert_allclose(added_BTD, np.broadcast_to(expected_BD[:, None], (3, T, D)), atol=1e-5)
    assert np.abs(np.diff(expected_BD, axis=0)).max(1).min() > 0.1


def test_sinusoidal_features_are_sines_and_cosines_of_thousandths():
    share_B = np.array([0.0, 0.001, 0.25, 1.0])
    angles = 1000 * share_B[:, None] * 10_000.0 ** (-np.arange(32) / 32)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(time_features("sinusoidal", jnp.asarray(share_B)), expected, atol=1e-4)


def test_learned_features_interpolate_between_the_rows_of_the_table():
    table_FD = jax.random.normal(ROOT, (INTERVALS + 1, D))
    on_rows = time_features("learned", jnp.arange(INTERVALS + 1) / INTERVALS) @ table_FD
    np.testing.assert_allclose(on_rows, table_FD, atol=1e-6)
    between = time_features("learned", jnp.array([(5 + 0.25) / INTERVALS])) @ table_FD
    np.testing.assert_allclose(between[0], 0.75 * table_FD[5] + 0.25 * table_FD[6], atol=1e-5)
    weights_BF = np.asarray(time_features("learned", jnp.linspace(0, 1, 1001)))
    np.testing.assert_allclose(weights_BF.sum(1), 1, atol=1e-5)
    assert ((weights_BF > 0).sum(1) <= 2).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rack_learns_what_only_the_time_tells(kind):
    """The tokens are all the same; which token is right depends on the hidden share alone."""
    rack, tokens_BT = make_rack(kind), jnp.zeros((4, T), jnp.int32)
    hidden_B = jnp.array([0.0, 0.25, 0.5, 1.0])
    targets_BT = jnp.broadcast_to(jnp.arange(4)[:, None] + 7, (4, T))
    optimizer = optax.adam(1e-2)

    def loss(params):
        logits_BTV = rack.apply({"params": params}, tokens_BT, hidden_B=hidden_B)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT).mean()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    params = rack.init_params(ROOT)
    assert np.abs(jax.grad(loss)(params)["embed"]["time"][NAMES[kind]]).max() > 0
    state = optimizer.init(params)
    for _ in range(150):
        params, state, value = step(params, state)
    assert value < 0.1  # without time at best log 4


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_tells_the_rack_that_nothing_is_hidden(kind):
    rack, tokens_BT = make_rack(kind), make_tokens()
    params = at_random(rack.init_params(ROOT))
    full_BTV = rack.apply({"params": params}, tokens_BT, hidden_B=jnp.zeros(3))
    positions_BT = jnp.broadcast_to(jnp.arange(T), (3, T))
    decoded_BTV, _ = model.decode(rack, params, tokens_BT, positions_BT, model.init_cache(rack, 3, T))
    np.testing.assert_allclose(decoded_BTV, full_BTV, atol=1e-4)
    other_BTV = rack.apply({"params": params}, tokens_BT, hidden_B=jnp.full(3, 0.5))
    assert np.abs(other_BTV - full_BTV).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_follow_the_rack(kind):
    rack = make_rack(kind, param_dtype="bf16", compute_dtype="bf16")
    params = at_random(rack.init_params(ROOT))
    assert params["embed"]["time"][NAMES[kind]].dtype == jnp.bfloat16
    assert model.embed_tokens(rack, params["embed"], make_tokens(), jnp.zeros(3)).dtype == jnp.bfloat16


def test_the_share_must_be_there_exactly_where_the_rack_takes_it():
    tokens_BT = make_tokens()
    plain, timed = make_rack(), make_rack("learned")
    params = {rack: rack.init_params(ROOT) for rack in (plain, timed)}
    with pytest.raises(UsageError, match="hidden_B is missing; give the share"):
        timed.apply({"params": params[timed]}, tokens_BT)
    with pytest.raises(UsageError, match="without time embedding; leave it out"):
        plain.apply({"params": params[plain]}, tokens_BT, hidden_B=jnp.zeros(3))
    with pytest.raises(UsageError, match=r"shape \(2,\) for 3 sequences"):
        model.embed_tokens(timed, params[timed]["embed"], tokens_BT, jnp.zeros(2))
    with pytest.raises(UsageError, match=r"'clock' is unknown \(model.time_embedding\)"):
        make_rack("clock")


@pytest.mark.parametrize("kind", ("none", *KINDS))
def test_it_survives_description_regrouping_and_linen_init(kind):
    rack = make_rack(kind)
    assert model.rack_from_dict(json.loads(json.dumps(model.rack_to_dict(rack)))) == rack
    assert model.regroup(rack, (2,)).time_embedding == kind
    hidden_B = None if kind == "none" else jnp.zeros(3)
    assert_equal_trees(
        jax.tree.map(jnp.shape, rack.init(ROOT, make_tokens(), hidden_B=hidden_B)["params"]),
        jax.tree.map(jnp.shape, rack.init_params(ROOT)),
    )


def test_a_description_without_the_field_is_a_rack_without_time():
    described = model.rack_to_dict(make_rack())
    del described["time_embedding"]
    assert model.rack_from_dict(described) == make_rack()


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_decides(kind):
    section = {"d_model": D, "n_heads": 2, "d_ff": 24, "time_embedding": kind}
    for time, expected in (("none", "none"), ("depth", "none"), ("input", kind)):
        config = {"model": section, "objective": {"kind": "diffusion", "time": time}}
        assert create_rack_from_config(config, V).time_embedding == expected
    specs = [{"n_blocks": 1, "block_spec": model.create_block_spec(D, 24, 2)}]
    assert create_rack_from_specs(V, D, specs, time_embedding=kind).time_embedding == kind
