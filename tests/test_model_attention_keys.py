"""How attention is asked for: presets, keywords, configuration, and what is refused."""

from __future__ import annotations

import pytest
from attention_cases import SIZED, block

from stackwise_jax.errors import UsageError
from stackwise_jax.model import (
    Block,
    KernelSpec,
    MLASpec,
    create_block_spec,
    create_rack_from_config,
    create_simple_rack,
)
from stackwise_jax.model.features import TYPES


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("mla_attention", ("mla", 8, None)),
        ("kernel_attention", ("mha", 8, "gaussian")),
        ("mlgka", ("mla", 2, "laplacian")),
    ],
)
def test_presets_of_other_attention(preset, expected):
    config = {"model": {"d_model": 64, "n_heads": 8, "attention_preset": preset, "vocab_size": 64}}
    for made in (
        create_rack_from_config(config).stacks[0].blocks[0],
        create_simple_rack(1, 1, 64, 96, 8, 64, attention_preset=preset).stacks[0].blocks[0],
        Block(**create_block_spec(64, attention_preset=preset)),
    ):
        kernel = made.kernel and made.kernel.type
        assert (made.attention_type, made.kv_heads, kernel) == expected
        assert made.attention_mode == "bidirectional"
    causal = create_block_spec(64, attention_preset=preset, attention_mode="causal", n_kv_heads=4)
    assert (causal["attention_mode"], causal["n_kv_heads"]) == ("causal", 4)


def test_keywords_say_sizes_and_kernels():
    spec = create_block_spec(64, n_heads=4, attention_type="mla", mla={"rq": 24, "v_dim": 8}, kernel="cauchy")
    assert spec["mla"] == MLASpec(rq=24, rkv=16, nope_dim=16, rope_dim=8, v_dim=8)
    assert spec["kernel"] == KernelSpec("cauchy")
    widths = {
        kind: create_block_spec(64, kernel={"type": kind, "bandwidth": None})["kernel"].bandwidth for kind in TYPES
    }
    assert widths == dict.fromkeys(TYPES, 1.0) | {"laplacian": 16.0}
    assert create_block_spec(64, attention_preset="mlgka", kernel={"bandwidth": 2.0})["kernel"].bandwidth == 2.0
    assert create_block_spec(64, attention_type="low_rank", n_kv_heads=2)["mla"].rkv == 16
    assert create_block_spec(64, attention_preset="mlgka", kernel={"mode": "linear"})["kernel"].type == "laplacian"
    assert create_block_spec(60, n_heads=7, attention_type="mla", mla=MLASpec(None, 8, 4, 4, 4))["n_heads"] == 7
    sizes = {"rq": 12, "rkv": 8, "nope_dim": 6, "rope_dim": 2, "v_dim": 5}
    kernel = {"type": "uniform", "mode": "linear", "features": 16, "bandwidth": 2.0, "learn": True}
    model = {"attention_type": "low_rank", "mla": {"rq": 12, "rkv": 8}, "kernel": kernel, "vocab_size": 64}
    made = create_rack_from_config({"model": {**model, "attention_implementation": "chunked"}}).stacks[0].blocks[0]
    assert (made.mla.rq, made.mla.rkv, made.attention_implementation) == (12, 8, "chunked")
    assert made.kernel == KernelSpec(**kernel)
    model = {"attention_preset": "mla_attention", "mla": sizes, "vocab_size": 64}
    assert create_rack_from_config({"model": model}).stacks[0].blocks[0].mla == MLASpec(**sizes)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: block("mqa"), r"attention type 'mqa' is unknown \(model\.attention_type\)"),
        (lambda: block("mha", mla=SIZED["mla"]), r"model\.mla is given and model\.attention_type is mha"),
        (lambda: block(attention_implementation="fast"), r"model\.attention_implementation is 'fast'; write one of"),
        (lambda: MLASpec(None, 8, 4, 3, 4), r"model\.mla\.rope_dim is 3; write an even number"),
        (lambda: MLASpec(0, 8, 4, 4, 4), r"model\.mla\.rq is 0; write at least 1"),
        (
            lambda: block("mla", KernelSpec("gaussian", "linear"), mla=MLASpec(None, 8, 3, 4, 4)),
            r"even head size, and model\.mla\.nope_dim is 3",
        ),
        (lambda: create_block_spec(64, mla={"rkv": 8}), r"model\.mla\.rkv is 8 and does nothing under .*type mha"),
        (
            lambda: create_block_spec(64, attention_type="low_rank", mla={"v_dim": 8}),
            r"model\.mla\.v_dim is 8 and does nothing under model\.attention_type low_rank",
        ),
        (
            lambda: create_block_spec(64, attention_preset="mlgka", mla={"rope_dim": 8}),
            r"model\.mla\.rope_dim is 8 and does nothing with model\.kernel",
        ),
        (
            lambda: create_block_spec(64, attention_type="mla", mla={"rope_dim": 8}, use_rope=False),
            r"model\.mla\.rope_dim is 8 and does nothing .* nor without model\.use_rope",
        ),
        (lambda: create_block_spec(64, attention_type="mla", mla={"rank": 8}), "unknown key in mla: rank"),
        (lambda: create_block_spec(64, kernel={"features": 64}), r"model\.kernel\.features is 64 and does nothing"),
        (lambda: create_block_spec(64, kernel={"kind": "cauchy"}), "unknown key in kernel: kind"),
        (lambda: create_block_spec(64, kernel="sinc"), r"model\.kernel\.type is 'sinc'"),
    ],
)
def test_impossible_attention_says_what_to_write(build, sentence):
    with pytest.raises(UsageError, match=sentence):
        build()
