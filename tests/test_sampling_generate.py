"""The command generate: text for people, one JSON line for scripts, one sentence for what is wrong."""

import json
from functools import cache
from types import SimpleNamespace

import jax
import pytest

from stackwise_jax import engine, generate
from stackwise_jax.config import StackWiseConfig
from stackwise_jax.curriculum.phase import Noise
from stackwise_jax.data import ByteTokenizer
from stackwise_jax.model import create_simple_rack
from stackwise_jax.sampling import ORDERS


@cache
def model():
    rack = create_simple_rack(n_stacks=1, blocks_per_stack=1, d_model=16, d_ff=16, n_heads=2, vocab_size=260)
    return rack, rack.init_params(jax.random.key(0))


def loaded(objective_kind, low=0.0, high=1.0, levels=None):
    rack, params = model()
    return SimpleNamespace(
        rack=rack, params=params, tokenizer=ByteTokenizer(), config=StackWiseConfig(), objective_kind=objective_kind,
        attention_mode="causal" if objective_kind == "clm" else "bidirectional", levels=levels,
        phase=SimpleNamespace(noise=Noise(low=low, high=high)),
    )  # fmt: skip


@pytest.fixture
def runs(monkeypatch):
    """Runs by name instead of from the disk, and the depths that were asked for."""
    found = {
        "here": [loaded("diffusion")],
        "causal": [loaded("clm")],
        "deep": [loaded("diffusion", levels=(0.8,))],
        "apart": [loaded("diffusion", 0.5, 1.0), loaded("diffusion", 0.0, 0.5)],
    }
    load_experts, load_rack, depths = engine.load_experts, engine.load_rack, []

    def rack_at(run_dir, depth=None):
        depths.append(depth)
        return found[run_dir][-1] if run_dir in found else load_rack(run_dir, depth)

    monkeypatch.setattr(engine, "load_experts", lambda run_dir: found.get(run_dir) or load_experts(run_dir))
    monkeypatch.setattr(engine, "load_rack", rack_at)
    return depths


@pytest.mark.parametrize("name", ["here", "causal", "deep", "apart"])
@pytest.mark.parametrize("depth", [None, 1])
def test_prints_the_text_and_ends_with_json(runs, capsys, name, depth):
    arguments = [name, "--prompt", "Größe ", "--max_tokens", "6", "--temperature", "0", "--json"]
    assert generate.main(arguments if depth is None else [*arguments, "--depth", "1"]) == 0
    printed, notes = capsys.readouterr()
    answer = json.loads(printed.splitlines()[-1])
    assert set(answer) == {"prompt", "text", "tokens", "seconds", "tokens_per_second"}
    assert printed.startswith(answer["text"])
    assert answer["text"].startswith("Größe ")
    assert 1 <= answer["tokens"] <= 6
    assert answer["tokens_per_second"] == pytest.approx(answer["tokens"] / answer["seconds"])
    assert runs == ([] if depth is None else [depth])
    assert notes == ""


def test_options_without_effect_are_named(runs, capsys):
    cold = ["here", "--max_tokens", "2", "--temperature", "0"]
    assert generate.main([*cold, "--top_k", "0", "--top_p", "0.5", "--seed", "3"]) == 0
    notes = capsys.readouterr().err
    why = "has no effect under --temperature 0, which takes the likeliest token"
    assert notes == "".join(f"note: --{name} {why}\n" for name in ("top_k", "top_p", "seed"))
    assert generate.main([*cold, "--seed", "3", "--order", "random"]) == 0
    assert generate.main([*cold[:3], "--top_k", "2", "--seed", "3"]) == 0
    assert capsys.readouterr().err == ""


def test_says_so_when_the_text_is_longer_than_what_was_trained(runs, capsys):
    assert generate.main(["here", "--prompt", "x" * 260, "--max_tokens", "2", "--temperature", "0"]) == 0
    printed, notes = capsys.readouterr()
    assert printed.startswith("x" * 260)
    assert "data.seq_len" in notes


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "nowhere"),
        (["here", "--temperature", "-1"], "temperature"),
        (["here", "--max_tokens", "-1"], "max_tokens"),
        (["here", "--block_size", "0"], "block_size"),
        (["here", "--block_size", "2", "--steps", "3", "--max_tokens", "9"], "block_size"),
        (["apart", "--steps", "1", "--max_tokens", "9"], "steps is 1"),
        (["here", "--order", "best"], "--order"),
        (["here", "--prompt", "\udcff"], "--prompt"),
        (["here", "--promt", "x"], "--promt"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(runs, capsys, arguments, named):
    assert generate.main(arguments) == 2
    printed, complaint = capsys.readouterr()
    assert printed == ""
    assert named in complaint
    assert complaint.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("here", []),
        ("causal", ["--steps", "--order", "--block_size"]),
        ("deep", ["--steps", "--block_size"]),
        ("apart", ["--block_size"]),
    ],
)
def test_options_that_a_model_does_not_have_are_refused(runs, capsys, name, refused):
    for option, value in (("--steps", "2"), ("--order", "entropy"), ("--block_size", "2")):
        code = generate.main([name, "--max_tokens", "4", *(["--steps", "2"] if name == "here" else []), option, value])
        complaint = capsys.readouterr().err
        assert code == (2 if option in refused else 0)
        assert (option in complaint) == (option in refused)
        assert complaint.count("\n") == (option in refused)


def test_the_orders_of_the_command_are_those_of_the_sampler():
    assert generate.ORDERS == ORDERS


@pytest.mark.parametrize("name", ["here", "causal", "deep", "apart"])
def test_a_model_whose_logits_are_no_numbers_fails_in_one_sentence(runs, capsys, name, monkeypatch):
    rack, params = model()
    broken = jax.tree.map(lambda x: x * float("nan"), params["head"])
    monkeypatch.setattr(f"{__name__}.model", lambda: (rack, params | {"head": broken}))
    models = [loaded("clm" if name == "causal" else "diffusion", levels=(0.8,) if name == "deep" else None)]
    if name == "apart":
        models = [loaded("diffusion", 0.5, 1.0), loaded("diffusion", 0.0, 0.5)]
    monkeypatch.setattr(engine, "load_experts", lambda run_dir: models)
    assert generate.main([name, "--max_tokens", "4", "--temperature", "0.7"]) == 1
    printed, error = capsys.readouterr()
    assert printed == "" and "not numbers" in error and len(error.splitlines()) == 1
