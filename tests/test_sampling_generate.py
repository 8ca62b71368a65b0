"""The command generate: text for people, one JSON line for scripts, one sentence for what is wrong."""

import json
from functools import cache
from types import SimpleNamespace

import jax
import pytest

from stackwise_jax import engine, generate
from stackwise_jax.config import StackWiseConfig
from stackwise_jax.data import ByteTokenizer
from stackwise_jax.model import create_simple_rack


@cache
def model():
    rack = create_simple_rack(n_stacks=1, blocks_per_stack=1, d_model=16, d_ff=16, n_heads=2, vocab_size=260)
    return rack, rack.init_params(jax.random.key(0))


@pytest.fixture(params=["clm", "diffusion"])
def run(request, monkeypatch):
    """The objective of a run that `load_rack` finds under the name `here`, and the depths it was asked for."""
    rack, params = model()
    found, load_rack = SimpleNamespace(objective_kind=request.param, depths=[]), engine.load_rack

    def load(run_dir, depth=None):
        if run_dir != "here":
            return load_rack(run_dir, depth)
        found.depths.append(depth)
        return SimpleNamespace(
            rack=rack, params=params, tokenizer=ByteTokenizer(), config=StackWiseConfig(),
            objective_kind=request.param, attention_mode="causal" if request.param == "clm" else "bidirectional",
        )  # fmt: skip

    monkeypatch.setattr(engine, "load_rack", load)
    return found


def test_prints_the_text_and_ends_with_json(run, capsys):
    arguments = ["here", "--prompt", "Größe ", "--max_tokens", "6", "--temperature", "0", "--depth", "1", "--json"]
    assert generate.main(arguments) == 0
    printed, notes = capsys.readouterr()
    answer = json.loads(printed.splitlines()[-1])
    assert set(answer) == {"prompt", "text", "tokens", "seconds", "tokens_per_second"}
    assert printed.startswith(answer["text"])
    assert answer["text"].startswith("Größe ")
    assert 1 <= answer["tokens"] <= 6
    assert answer["tokens_per_second"] == pytest.approx(answer["tokens"] / answer["seconds"])
    assert run.depths == [1]
    assert notes == ""


def test_says_so_when_the_text_is_longer_than_what_was_trained(run, capsys):
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
        (["here", "--order", "best"], "--order"),
        (["here", "--prompt", "\udcff"], "--prompt"),
        (["here", "--promt", "x"], "--promt"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(run, capsys, arguments, named):
    assert generate.main(arguments) == 2
    printed, complaint = capsys.readouterr()
    assert printed == ""
    assert named in complaint
    assert complaint.count("\n") == 1


def test_steps_belong_to_unmasking(run, capsys):
    code = generate.main(["here", "--max_tokens", "4", "--steps", "2", "--order", "random"])
    assert code == (2 if run.objective_kind == "clm" else 0)
    assert ("--steps" in capsys.readouterr().err) == (run.objective_kind == "clm")
