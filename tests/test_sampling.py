"""Sampling a tiny random rack: cache against recomputation, unmasking against a plain loop, the text around both."""

from functools import cache, partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from stackwise_jax.curriculum.phase import Noise
from stackwise_jax.errors import UsageError
from stackwise_jax.model import KernelSpec, create_simple_rack
from stackwise_jax.objectives.batch import Vocab
from stackwise_jax.sampling import (
    Expert,
    causal,
    generate_causal,
    generate_unmask,
    model_of,
    sample,
    sample_text,
    text,
    unmask_counts,
)

VOCAB = Vocab(size=40, mask_id=3, pad_id=0, special_ids=(0, 1, 2, 3), eos_id=2)
GREEDY = {"max_tokens": 8, "temperature": 0.0}
ROOT_KEY = jax.random.key(0)


@cache
def build(attention_mode="causal", **attention):
    """A rack whose logits depend strongly on the whole context, and its parameters."""
    rack = create_simple_rack(
        n_stacks=2, blocks_per_stack=2, d_model=32, d_ff=64, n_heads=4, n_kv_heads=2, vocab_size=48,
        attention_mode=attention_mode, **attention,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(rack.init_params, jax.random.key(0))
    return rack, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.7).astype(leaf.dtype), shapes)


@partial(jax.jit, static_argnames=("rack", "mode"))
def full_logits(rack, params, row_T, mode):
    return rack.apply({"params": params}, row_T[None], attention_mode=mode)[0]


@pytest.fixture(scope="module")
def causal_model():
    return build()


@pytest.fixture(scope="module")
def masked_model():
    return build("bidirectional")


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(4, 40, length).astype(np.int32)


def best_ids(logits_TV):
    """The likeliest ids that are text."""
    return np.asarray(logits_TV)[:, 4:40].argmax(-1) + 4


OTHER_ATTENTION = [{"attention_preset": "mla_attention"}, {"attention_preset": "mlgka"}]
OTHER_ATTENTION += [{"attention_preset": "kernel_attention", "kernel": KernelSpec("gaussian", "linear", 64)}]


@pytest.mark.parametrize(
    ("n_prompt", "own_mode", "attention"),
    [(1, "causal", {}), (7, "bidirectional", {}), (64, "causal", {}), *((9, "causal", how) for how in OTHER_ATTENTION)],
)
def test_cached_decoding_equals_full_recomputation(n_prompt, own_mode, attention):
    rack, params = build(own_mode, **attention)
    prompt_P = prompt_of(n_prompt)
    ids = generate_causal(rack, params, prompt_P, key=ROOT_KEY, vocab=VOCAB, **GREEDY)
    assert len(ids) == n_prompt + 8
    np.testing.assert_array_equal(ids[:n_prompt], prompt_P)
    # The model is causal, so one pass over the result recomputes every choice.
    logits_TV = full_logits(rack, params, np.pad(ids, (0, 80 - len(ids))), "causal")
    np.testing.assert_array_equal(ids[n_prompt:], best_ids(logits_TV)[n_prompt - 1 : len(ids) - 1])
    assert len(set(ids[n_prompt:])) > 2  # not one token over and over, which a broken cache might get right


def test_causal_stops_at_a_stop_token(causal_model):
    def run(**how):
        return generate_causal(*causal_model, prompt_of(5), key=ROOT_KEY, vocab=VOCAB, **GREEDY, **how)[5:]

    full = run()
    stop = int(full[4])
    np.testing.assert_array_equal(run(stop_ids=(stop,)), full[: list(full).index(stop) + 1])


def test_the_key_decides_and_prompts_of_one_padded_length_share_one_compilation(causal_model):
    def run(n_prompt, seed):
        how = {"max_tokens": 9, "temperature": 1.5, "vocab": VOCAB}
        return generate_causal(*causal_model, prompt_of(n_prompt), key=jax.random.key(seed), **how)

    before = causal._decode._cache_size()
    first = run(5, 1)
    np.testing.assert_array_equal(run(5, 1), first)
    assert (run(5, 2) != first).any()
    assert len(run(63, 2)) == 72
    assert causal._decode._cache_size() == before + 1


def test_special_tokens_never_come_out_of_either_sampler(causal_model, masked_model):
    how = {"key": ROOT_KEY, "temperature": 100.0, "vocab": VOCAB}  # nearly uniform: each forbidden id would show up
    drawn = generate_causal(*causal_model, prompt_of(2), max_tokens=120, **how)[2:]
    filled = generate_unmask(*masked_model, prompt_of(2), length=120, steps=4, **how)[2:]
    for ids in (drawn, filled):
        assert ids.min() >= 4
        assert ids.max() < 40
        assert len(set(ids)) > 25
    ended = generate_causal(*causal_model, prompt_of(2), max_tokens=120, stop_ids=(2,), **how)[2:]
    assert ended[-1] == 2  # unless it may end the text
    assert ended[:-1].min() >= 4


@pytest.mark.parametrize("length", [0, 1, 2, 7, 64, 129])
@pytest.mark.parametrize("steps", [1, 2, 5, 64, 500])
def test_unmask_counts_settle_every_token_on_the_cosine_grid(length, steps):
    counts_S = unmask_counts(length, steps)
    n_steps = min(length, steps)
    assert counts_S.shape == (n_steps,)
    assert counts_S.sum() == length
    assert (counts_S >= 1).all()
    if 0 < n_steps <= length // 10:  # far from the limit of one per pass
        left_S = length - counts_S.cumsum()
        grid_S = length * np.cos(np.pi / 2 * np.arange(1, n_steps + 1) / n_steps)
        np.testing.assert_allclose(left_S, grid_S, atol=1.0)


def sureness_by_hand(logits_TV, order):
    odds_TV = np.exp(logits_TV - logits_TV.max(-1, keepdims=True), dtype=np.float64)
    probs_TV = odds_TV / odds_TV.sum(-1, keepdims=True)
    if order == "entropy":
        return (probs_TV * np.log(np.maximum(probs_TV, 1e-300))).sum(-1)
    second_T, best_T = np.sort(probs_TV)[:, -2:].T
    return best_T if order == "confidence" else best_T - second_T


def unmask_by_hand(rack, params, prompt_P, length, steps, mode, order="confidence", block=None):
    """Temperature 0, one pass at a time on the bare row (no padding, no segment ids), blocks of equal length."""
    row_T = np.concatenate([prompt_P, np.full(length, VOCAB.mask_id)]).astype(np.int32)
    block = block or length
    for start in range(len(prompt_P), len(row_T), block):
        for count in unmask_counts(block, steps * block // length):
            logits_TV = np.asarray(full_logits(rack, params, row_T, mode))[:, 4:40]
            sure_T = sureness_by_hand(logits_TV, order)
            sure_T[(row_T != VOCAB.mask_id) | (np.arange(len(row_T)) >= start + block)] = -np.inf
            chosen = np.argsort(-sure_T)[:count]
            row_T[chosen] = logits_TV[chosen].argmax(-1) + 4
    return row_T


@pytest.mark.parametrize(
    ("steps", "mode", "order", "block"),
    [
        (1, "bidirectional", "confidence", None),
        (12, "bidirectional", "confidence", None),
        (4, "causal", "confidence", None),
        (5, "bidirectional", "entropy", None),
        (5, "bidirectional", "margin", None),
        (6, "bidirectional", "confidence", 4),
        (12, "bidirectional", "margin", 3),
    ],
)
def test_unmasking_equals_a_plain_loop(masked_model, steps, mode, order, block):
    prompt_P = prompt_of(6)
    how = {"key": ROOT_KEY, "temperature": 0.0, "vocab": VOCAB, "attention_mode": mode, "order": order}
    ids = generate_unmask(*masked_model, prompt_P, length=12, steps=steps, block_size=block, **how)
    np.testing.assert_array_equal(ids, unmask_by_hand(*masked_model, prompt_P, 12, steps, mode, order, block))


def test_random_order_depends_on_the_key_alone(masked_model):
    def run(order, seed):
        how = {"order": order, "temperature": 0.0, "vocab": VOCAB}
        ids = generate_unmask(*masked_model, prompt_of(4), length=8, key=jax.random.key(seed), **how)
        assert not (ids == VOCAB.mask_id).any()
        np.testing.assert_array_equal(ids[:4], prompt_of(4))
        return tuple(ids)

    assert len({run("random", seed) for seed in range(6)}) > 2
    assert run("random", 0) == run("random", 0)
    assert len({run("confidence", seed) for seed in range(3)}) == 1


def test_a_prompt_that_holds_the_mask_token_is_kept(masked_model):
    prompt_P = np.array([5, VOCAB.mask_id, 6], np.int32)
    ids = generate_unmask(*masked_model, prompt_P, length=4, key=ROOT_KEY, vocab=VOCAB)
    np.testing.assert_array_equal(ids[:3], prompt_P)
    assert (ids[3:] >= 4).all()


def test_nothing_asked_nothing_made(causal_model, masked_model):
    for ids in (
        generate_causal(*causal_model, prompt_of(3), max_tokens=0, key=ROOT_KEY, vocab=VOCAB),
        generate_unmask(*masked_model, prompt_of(3), length=0, key=ROOT_KEY, vocab=VOCAB),
    ):
        np.testing.assert_array_equal(ids, prompt_of(3))


def test_wrong_arguments_are_refused_by_name(causal_model, masked_model):
    how = {"key": ROOT_KEY, "vocab": VOCAB}
    with pytest.raises(UsageError, match="max_tokens"):
        generate_causal(*causal_model, prompt_of(3), max_tokens=-1, **how)
    with pytest.raises(UsageError, match="BOS"):
        generate_causal(*causal_model, [], max_tokens=1, **how)
    with pytest.raises(UsageError, match="steps"):
        generate_unmask(*masked_model, prompt_of(3), length=4, steps=0, **how)
    with pytest.raises(UsageError, match="confidence, random, entropy or margin"):
        generate_unmask(*masked_model, prompt_of(3), length=4, order="best", **how)
    with pytest.raises(UsageError, match="block_size is 0"):
        generate_unmask(*masked_model, prompt_of(3), length=4, block_size=0, **how)
    with pytest.raises(UsageError, match="steps is 2 and there are 3 blocks"):
        generate_unmask(*masked_model, prompt_of(3), length=5, steps=2, block_size=2, **how)


def letters():
    """A tokenizer over 36 letters and digits with the ids of VOCAB; BOS 1, EOS 2."""
    symbols = "abcdefghijklmnopqrstuvwxyz0123456789"
    return SimpleNamespace(
        vocab_size=40, special_ids=(0, 1, 2, 3), unk_id=None, pad_id=0, bos_id=1, eos_id=2, mask_id=3,
        encode=lambda text: np.array([4 + symbols.index(letter) for letter in text], np.int32),
        decode=lambda ids: "".join(symbols[i - 4] for i in ids if i >= 4),
    )  # fmt: skip


@pytest.mark.parametrize("prompt", ["", "abc", "x" * 100])
@pytest.mark.parametrize("objective_kind", ["clm", "mlm", "diffusion"])
def test_text_starts_with_the_prompt(causal_model, masked_model, objective_kind, prompt):
    model = causal_model if objective_kind == "clm" else masked_model
    how = {"objective_kind": objective_kind, "max_tokens": 5, "seed": 3}
    result = sample(*model, letters(), prompt, **how)
    assert result.text.startswith(prompt)
    assert result.n_prompt == len(prompt) + 1
    assert 0 < result.n_new <= 5
    assert result.text == sample_text(*model, letters(), prompt, **how)
    if objective_kind != "clm":
        assert len(result.text) == len(prompt) + 5


@pytest.mark.parametrize("objective_kind", ["clm", "diffusion"])
def test_the_text_ends_at_eos_whatever_the_model_is(objective_kind, monkeypatch):
    """What comes behind EOS is no text, and EOS itself is no letter."""
    ids = [VOCAB.eos_id if i == 6 else 4 + i for i in range(9)]
    names = ("generate_causal", "generate_unmask")
    for name in names:
        monkeypatch.setattr(text, name, lambda *args, **how: np.array(ids, np.int32)[: 7 if "max_tokens" in how else 9])
    result = sample(None, {}, letters(), "ab", objective_kind=objective_kind, max_tokens=6)
    assert (result.text, result.n_prompt, result.n_new) == ("abcdef", 3, 4)


def test_the_way_follows_from_what_the_model_is(masked_model, monkeypatch):
    ways = []
    for name in ("generate_unmask", "generate_depth", "generate_independent"):
        way = getattr(text, name)
        monkeypatch.setattr(
            text, name, lambda *args, _way=way, **how: (ways.append(_way.__name__), _way(*args, **how))[1]
        )
    rack, params = masked_model
    how = {"objective_kind": "diffusion", "max_tokens": 6, "order": "margin"}
    experts = [Expert(0.5, 1.0, rack, params), Expert(0.0, 0.5, rack, params)]
    for model in ({}, {"levels": (0.9, 0.4)}, {"experts": experts}, {"experts": experts, "levels": (0.9, 0.4)}):
        assert len(sample_text(rack, params, letters(), "abc", **model, **how)) == 9
    assert ways == ["generate_unmask", "generate_depth", "generate_independent", "generate_independent"]


def run_of(low, high, levels=None):
    phase = SimpleNamespace(noise=Noise(kind="range", low=low, high=high))
    names = {"objective_kind": "diffusion", "attention_mode": None, "tokenizer": letters(), "rack": low, "params": {}}
    return SimpleNamespace(phase=phase, levels=levels, **names)


def test_models_of_falling_noise_sample_together_and_others_alone():
    found = model_of([run_of(0.6, 1.0), run_of(0.3, 0.7), run_of(0.0, 0.4)])
    assert [(e.low, e.high, e.rack) for e in found["experts"]] == [(0.6, 1.0, 0.6), (0.3, 0.7, 0.3), (0.0, 0.4, 0.0)]
    for runs in ([run_of(0.0, 1.0)], [run_of(0.0, 1.0)] * 2, [run_of(0.0, 0.5), run_of(0.5, 1.0)]):
        assert model_of(runs)["experts"] == ()
        assert model_of(runs)["rack"] == runs[-1].rack


def test_levels_count_only_where_they_fall_with_depth():
    assert model_of([run_of(0.5, 0.5, levels=(0.9, 0.9, 0.2))])["levels"] == (0.9, 0.9, 0.2)
    assert model_of([run_of(0.5, 0.5, levels=(0.2, 0.9))])["levels"] is None
    assert model_of([run_of(0.5, 0.5)])["levels"] is None
