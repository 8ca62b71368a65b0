"""The helpers by the names and keywords that users of StackWise know."""

import jax
import pytest

from stackwise_jax.config.schema import ArchitectureConfig, ModelConfig, StackWiseConfig
from stackwise_jax.errors import UsageError
from stackwise_jax.model import (
    Block,
    create_block_spec,
    create_rack_from_config,
    create_rack_from_specs,
    create_simple_rack,
    create_stack_from_spec,
    padded_vocab,
    resolve_attention,
)


def test_the_guide_works_as_written():
    block_spec = create_block_spec(
        d_model=512,
        d_ff=2048,
        n_heads=8,
        n_kv_heads=2,
        attention_type="gqa",
        attention_mode="bidirectional",
        dropout=0.1,
        freeze_up_proj=True,
    )
    assert block_spec["n_kv_heads"] == 2 and block_spec["dropout"] == 0.1
    stack = create_stack_from_spec(stack_id=0, n_blocks=4, block_spec=block_spec, freeze_blocks=False)
    assert len(stack.blocks) == 4 and stack.blocks[0] == Block(**block_spec)
    rack = create_simple_rack(n_stacks=2, blocks_per_stack=4, d_model=512, d_ff=2048, n_heads=8, vocab_size=10000)
    assert [len(stack.blocks) for stack in rack.stacks] == [4, 4] and rack.tie_embeddings
    assert rack.stacks[0].blocks[0].attention_mode == "bidirectional"
    stack_specs = [
        {"stack_id": 0, "n_blocks": 4, "block_spec": block_spec, "freeze_blocks": False},
        {"stack_id": 1, "n_blocks": 4, "block_spec": block_spec, "freeze_blocks": True},
    ]
    rack = create_rack_from_specs(vocab_size=10000, d_model=512, stack_specs=stack_specs, tie_embeddings=True)
    assert [stack.freeze_blocks for stack in rack.stacks] == [False, True]
    assert rack.parameter_count() > rack.parameter_count(trainable_only=True) > 10000 * 512
    short = [{"n_blocks": 3, "block_spec": create_block_spec(d_model=256, attention_mode="causal")}]
    assert create_rack_from_specs(5000, 256, short).stacks[0].blocks[0].attention_mode == "causal"


def test_rack_from_config_uses_every_key_of_the_section():
    changed = ModelConfig(
        d_model=64,
        n_heads=8,
        n_kv_heads=2,
        d_ff=96,
        vocab_size=300,
        attention_preset="bert_style",
        use_rope=False,
        rope_theta=500.0,
        dropout=0.25,
        freeze_up_proj=False,
        tie_embeddings=True,
        norm_eps=1e-5,
        init_std=0.1,
        param_dtype="bf16",
        compute_dtype="fp16",
        remat=True,
        architecture=ArchitectureConfig(n_stacks=3, blocks_per_stack=1),
    )
    rack = create_rack_from_config(StackWiseConfig(model=changed), vocab_size=260)
    assert create_rack_from_config(StackWiseConfig(model=changed).to_dict(), vocab_size=260) == rack
    assert len(rack.stacks) == 3 and all(stack.remat and len(stack.blocks) == 1 for stack in rack.stacks)
    assert rack.stacks[0].blocks[0] == Block(
        d_model=64,
        d_ff=96,
        n_heads=8,
        n_kv_heads=2,
        attention_mode="bidirectional",
        dropout=0.25,
        freeze_up_proj=False,
        use_rope=False,
        rope_theta=500.0,
        norm_eps=1e-5,
        param_dtype="bf16",
        compute_dtype="fp16",
    )
    assert (rack.vocab_size, rack.d_model, rack.tie_embeddings) == (300, 64, True)
    assert (rack.norm_eps, rack.init_std, rack.param_dtype, rack.compute_dtype) == (1e-5, 0.1, "bf16", "fp16")
    assert [stack.stack_id for stack in rack.stacks] == [0, 1, 2]


def test_default_config_and_partial_dict():
    rack = create_rack_from_config(StackWiseConfig(), vocab_size=260)
    assert rack.vocab_size == 384 and rack.stacks[0].blocks[0].attention_mode == "causal"
    rack = create_rack_from_config({"model": {"d_model": 64, "attention_mode": "bidirectional"}}, vocab_size=128)
    assert rack.vocab_size == 128 and rack.d_model == 64
    assert rack.stacks[0].blocks[0].attention_mode == "bidirectional"
    shapes = jax.eval_shape(rack.init_params, jax.random.key(0))
    assert shapes["embed"]["embedding"].shape == (128, 64)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("bert_style", 8), ("bidirectional", 8)),
        (("gpt_style", 8), ("causal", 8)),
        (("gpt_style", 8, 2), ("causal", 2)),
        (("efficient_gqa", 8), ("bidirectional", 2)),
        (("efficient_gqa", 2), ("bidirectional", 1)),
        (("efficient_gqa", 14), ("bidirectional", 2)),
        (("efficient_gqa", 8, 4, "causal"), ("causal", 4)),
        (("custom", 8, 4, "causal"), ("causal", 4)),
        (("custom", 8, None, "bidirectional"), ("bidirectional", 8)),
    ],
)
def test_attention_presets(given, expected):
    assert resolve_attention(*given) == expected


def test_attention_type_shares_keys_and_values():
    assert create_block_spec(64, n_heads=8, attention_type="gqa")["n_kv_heads"] == 2
    assert create_block_spec(64, n_heads=8, attention_type="mha")["n_kv_heads"] == 8
    assert create_block_spec(64)["d_ff"] == 256


def test_vocabulary_is_padded_only_when_it_is_the_tokenizers():
    assert [padded_vocab(None, size, 128) for size in (1, 128, 129)] == [128, 128, 256]
    assert padded_vocab(130, 129, 128) == 130 and padded_vocab(7, None, 128) == 7


def config(**model) -> dict:
    return {"model": {"vocab_size": 64, **model}}


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: create_rack_from_config(config(n_heads=3)), r"model\.n_heads 3 does not divide model\.d_model 128"),
        (lambda: create_rack_from_config(config(architecture={"n_stacks": 0})), r"n_stacks is 0; write at least 1"),
        (lambda: create_rack_from_config(config(architecture={"blocks_per_stack": 0})), "blocks_per_stack"),
        (lambda: create_rack_from_config(config(architecture={"n_blocks": 4})), "n_blocks.*n_stacks.*blocks_per_stack"),
        (lambda: create_rack_from_config(config(d_modle=4)), r"d_modle.*model\.d_model"),
        (lambda: create_rack_from_config(config(attention_preset="custom")), r"needs model\.attention_mode"),
        (lambda: create_rack_from_config(config(), vocab_size=65), r"vocab_size 64 is smaller than the tokenizer's 65"),
        (lambda: create_rack_from_config({}), r"model\.vocab_size is not set"),
        (lambda: padded_vocab(None, 5, 0), r"vocab_multiple is 0"),
        (lambda: create_simple_rack(0, 1, 8, 8, 2, 8), r"n_stacks is 0"),
        (lambda: create_simple_rack(1, 0, 8, 8, 2, 8), r"blocks_per_stack is 0"),
        (lambda: create_simple_rack(1, 1, 8, 8, 2, 8, droput=0.1), "keyword droput; the nearest valid one is dropout"),
        (lambda: create_block_spec(64, attention_preset="gpt"), "preset 'gpt' is unknown"),
        (lambda: create_block_spec(64, attention_type="mqa"), "attention_type 'mqa' is unknown"),
        (lambda: create_block_spec(64, n_kv_heads=2, attention_type="mha"), "mha has as many"),
        (lambda: create_stack_from_spec(0, 0, create_block_spec(64)), "n_blocks is 0"),
        (lambda: create_stack_from_spec(0, 1, {"d_model": 8}), "lacks d_ff and n_heads"),
        (lambda: create_stack_from_spec(0, 1, {"d_mode": 8}), "d_mode; the nearest valid one is d_model"),
        (lambda: create_rack_from_specs(8, 8, []), "stack_specs is empty"),
        (lambda: create_rack_from_specs(8, 8, [{"n_blocks": 1}]), r"stack_specs\[0\] lacks block_spec"),
        (
            lambda: create_rack_from_specs(8, 8, [{"stack_id": 2, "n_blocks": 1, "block_spec": create_block_spec(64)}]),
            r"stack_specs\[0\] has the stack_id 2; write 0",
        ),
        (
            lambda: create_rack_from_specs(8, 8, [{"n_blocks": 1, "block_spec": create_block_spec(64)}]),
            "stack 0 has d_model 64 in a rack of 8",
        ),
    ],
)
def test_wrong_requests_say_what_to_write(build, sentence):
    with pytest.raises(UsageError, match=sentence):
        build()
