"""Latent attention is DeepSeek-V3's: the same parameters give the same outputs as Hugging Face's class.

tests/golden/deepseek_attention.json is written by experiments/deepseek_golden.py. Where transformers and torch are
installed, other weights are compared with the class itself.

Legend: B batch, T sequence, D d_model, H heads, r size of the rotary part.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.model import Block
from stackwise_jax.model.attention import cached_attention, init_attention, init_attention_cache, self_attention
from stackwise_jax.model.mla import MLASpec

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden" / "deepseek_attention.json").read_text())
MATRICES = {"q_proj": "q", "q_a_proj": "q_a", "q_b_proj": "q_b", "kv_a_proj_with_mqa": "kv_a", "kv_b_proj": "kv_b"}
MATRICES |= {"o_proj": "o"}
NORMS = {"q_a_layernorm": "q_norm", "kv_a_layernorm": "kv_norm"}


def block_of(case) -> Block:
    sizes = MLASpec(**{name: case[name] for name in ("rq", "rkv", "nope_dim", "rope_dim", "v_dim")})
    shape = {name: case[name] for name in ("d_model", "n_heads", "rope_theta")}
    return Block(d_ff=4, attention_type="mla", mla=sizes, **shape)


def params_of(case) -> dict:
    """Our parameters from theirs: matrices transposed, rotary columns that stand in pairs brought half a head apart."""
    r, rkv = case["rope_dim"], case["rkv"]
    apart = np.arange(r).reshape(-1, 2).T.ravel() if case["interleave"] else np.arange(r)
    params = {}
    for name, values in case["state"].items():
        name, value = name.removesuffix(".weight"), np.asarray(values, np.float32)
        if name in NORMS:
            params[NORMS[name]] = {"scale": value}
            continue
        kernel_IO = value.T
        if name in ("q_proj", "q_b_proj"):
            heads_IHd = kernel_IO.reshape(len(kernel_IO), case["n_heads"], -1)
            heads_IHd = np.concatenate([heads_IHd[..., :-r], heads_IHd[..., -r:][..., apart]], axis=-1)
            kernel_IO = heads_IHd.reshape(kernel_IO.shape)
        elif name == "kv_a_proj_with_mqa":
            kernel_IO = np.concatenate([kernel_IO[:, :rkv], kernel_IO[:, rkv:][:, apart]], axis=1)
        params[MATRICES[name]] = {"kernel": kernel_IO}
    return params


def assert_the_same(case):
    block, params = block_of(case), params_of(case)
    shapes = jax.eval_shape(lambda: init_attention(block, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    x_BTD, positions_T = np.asarray(case["inputs"], np.float32), np.asarray(case["positions"])
    run = jax.jit(lambda params, x_BTD, at_BT: self_attention(block, params, x_BTD, at_BT, None, True))
    outputs_BTD = run(params, x_BTD, positions_T[None])
    np.testing.assert_allclose(outputs_BTD, case["outputs"], atol=1e-4)
    return block, params, x_BTD


@pytest.mark.parametrize("name", GOLDEN)
def test_outputs_are_those_of_the_golden_file(name):
    assert_the_same(GOLDEN[name])


def test_absorbed_decoding_gives_them_too():
    """Positions in a cache count from 0: scores depend on differences only, so the outputs are the same."""
    case = GOLDEN["interleaved"]
    block, params, x_BTD = assert_the_same(case)
    cache = init_attention_cache(block, 2, 7, jnp.float32)
    assert {name: leaf.shape for name, leaf in cache.items()} == {"latent": (2, 7, 12), "rope": (2, 7, 4)}
    step = jax.jit(lambda x_B1D, t, cache: cached_attention(block, params, x_B1D, jnp.full((2, 1), t), cache))
    for t in range(7):
        o_B1D, cache = step(x_BTD[:, t : t + 1], t, cache)
        np.testing.assert_allclose(o_B1D[:, 0], np.asarray(case["outputs"])[:, t], atol=1e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_other_weights_agree_with_the_class_itself(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("golden", HERE.parent / "experiments" / "deepseek_golden.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert_the_same(script.attention_case(script.CASES[name], seed=17))
