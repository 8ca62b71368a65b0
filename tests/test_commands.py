"""The commands as a person uses them: what they answer, and what they say when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import SHORT, Said, arguments, content, finish, rows, start

from stackwise_jax.evaluate import main as evaluate
from stackwise_jax.generate import main as generate
from stackwise_jax.inspect import main as inspect
from stackwise_jax.train import main as train

pytestmark = pytest.mark.slow


@pytest.fixture
def say(capsys):
    def run(main, *argv) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A finished run; tests only read it."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    assert train(arguments(SHORT, dir=path)) == 0
    return path


# What they answer.


def test_train_writes_what_it_promises(run_dir):
    present = {path.name for path in run_dir.iterdir()}
    assert present >= {"config.yaml", "phases.json", "metrics.jsonl", "summary.json", "checkpoints", "tokenizer"}
    summary = json.loads((run_dir / "summary.json").read_text())
    keys = {"name", "held_out_loss", "bits_per_byte", "trainable_params", "frozen_params", "tokens", "flops", "seconds"}
    for phase in summary["phases"]:
        assert phase.keys() >= keys | {"peak_device_bytes", "peak_host_bytes"}
    steps = [row for row in rows(run_dir) if "lr" in row]
    assert [row["global_step"] for row in steps] == list(range(1, 13))


def test_a_finished_run_says_so_and_stays_as_it_is(run_dir, say):
    before = content(run_dir)
    said = say(train, *arguments(SHORT, dir=run_dir, sample_tokens=0), "--json")
    assert said.code == 0 and "is finished; there is nothing left to do" in " ".join(said.out.split())
    assert said.answer["bits_per_byte"] == json.loads((run_dir / "summary.json").read_text())["bits_per_byte"]
    after = content(run_dir)
    assert {name: text for name, text in after.items() if name != "summary.json"} == {
        name: text for name, text in before.items() if name != "summary.json"
    }


def test_a_dry_run_shows_the_phases_and_writes_nothing(tmp_path, say):
    said = say(train, *arguments(SHORT, dir=tmp_path / "run"), "--dry-run", "--json")
    assert said.code == 0 and list(tmp_path.iterdir()) == []
    assert [phase["name"] for phase in said.answer["phases"]] == ["stack 0", "stack 1", "stack 2"]
    assert said.answer["phases"][2]["trainable_params"] > 0 and said.answer["phases"][2]["total_bytes"] > 0
    assert "stack 2" in said.out.rpartition("\n{")[0]


def test_evaluate_measures_at_any_depth_and_on_a_text_of_ones_own(run_dir, tmp_path, say):
    phases = json.loads((run_dir / "summary.json").read_text())["phases"]
    said = say(evaluate, run_dir, "--json")
    assert said.code == 0 and said.answer.keys() >= {"loss", "perplexity", "bits_per_byte"}
    assert f"{said.answer['loss']:.4f}" in said.out
    assert say(evaluate, run_dir, "--depth", 1, "--json").answer["loss"] == pytest.approx(phases[0]["held_out_loss"])
    mine = tmp_path / "mine.txt"
    mine.write_text("some words\n\nof my own, long enough\n")
    assert say(evaluate, run_dir, "--data.path", mine, "--json").answer["loss"] > said.answer["loss"]


def test_draws_without_effect_are_named(run_dir, say):
    assert say(evaluate, run_dir, "--batches", 1).err == ""
    drawn = say(evaluate, run_dir, "--batches", 1, "--draws", 4)
    assert drawn.err == "note: --draws has no effect under objective clm, which hides nothing\n"
    assert say(evaluate, run_dir, "--batches", 1, "--draws", 1, "--objective", "diffusion").err == ""


def test_generate_continues_a_prompt(run_dir, say):
    said = say(generate, run_dir, "--prompt", "AB", "--max_tokens", 6, "--json")
    assert said.code == 0 and said.answer["tokens"] == 6 and said.answer["text"].startswith("AB")


def test_inspect_shows_a_run_and_a_stack(run_dir, say):
    said = say(inspect, run_dir, "--json")
    assert said.code == 0 and said.answer["damage"] == [] and "stacks/002" in said.out
    said = say(inspect, run_dir, "--stack", 1, "--norms", "--json")
    assert said.code == 0 and {item["name"] for item in said.answer["items"]} == {"stacks/001"}
    newest = max(said.answer["items"], key=lambda item: item["version"])
    assert all(leaf["norm"] > 0 for leaf in newest["leaves"])


# What they refuse before any work.

BAD_KEYS = {
    "misspelled key": ({"model.d_modle": 32}, ["model.d_modle", "the nearest valid one is model.d_model"]),
    "misspelled section": ({"modle.d_model": 32}, ["modle.d_model", "model.d_model"]),
    "old key": (
        {"model.n_blocks": 2},
        ["n_blocks", "model.architecture.n_stacks", "model.architecture.blocks_per_stack"],
    ),
    "heads that do not divide": ({"model.n_heads": 3}, ["model.n_heads is 3", "divisor of model.d_model (32)"]),
    "kv heads that do not divide": ({"model.n_kv_heads": 3, "model.n_heads": 4}, ["model.n_kv_heads is 3", "divisor"]),
    "no stack": ({"model.architecture.n_stacks": 0}, ["model.architecture.n_stacks is 0", "at least 1"]),
    "no number": ({"model.architecture.n_stacks": "three"}, ["model.architecture.n_stacks", "whole number"]),
    "sequence longer than the text": (
        {"data.seq_len": 1024, "data.synthetic_tokens": 1000},
        ["data.synthetic_tokens is 1000", "data.seq_len (1024)"],
    ),
    "batch larger than the text": ({"data.synthetic_tokens": 40}, ["data.batch_size 8", "data.seq_len"]),
    "phase off its path": (
        {"curriculum.plan": "custom", "curriculum.phases": "[{path: [0, 1], train: [2]}]"},
        ["curriculum.phases[0]", "[2]", "not on the path"],
    ),
    "phase with a stack that is not there": (
        {"curriculum.plan": "custom", "curriculum.phases": "[{train: [7]}]"},
        ["curriculum.phases[0]", "[7]", "0-2"],
    ),
    "phase in which nothing learns": (
        {"curriculum.plan": "custom", "curriculum.phases": "[{train_head: false}]"},
        ["curriculum.phases[0]", "nothing learns", "train_embed"],
    ),
    "tied head over a frozen embedding": ({"model.tie_embeddings": "true"}, ["stack 1", "model.tie_embeddings false"]),
    "too many devices": ({"mesh.data": 4096, "data.batch_size": 4096}, ["mesh.data 4096", "write mesh.data 1"]),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_wrong_keys_are_refused_in_one_sentence(case, tmp_path, say):
    changes, parts = BAD_KEYS[case]
    said = say(train, *arguments(changes, dir=tmp_path / "run"), "--json")
    said.refuses(2, *parts)
    assert said.answer == {"error": said.err.removeprefix("error: ").strip(), "exit_code": 2}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model:\n  d_modl: 4\n", ["unknown key model.d_modl", "model.d_model"]),
        ("model:\n  n_blocks: 4\n", ["model.n_blocks", "model.architecture.n_stacks"]),
        ("model: [\n", ["no valid YAML"]),
        ("", ["is empty"]),
    ],
)
def test_wrong_configuration_files_are_named(text, parts, tmp_path, say):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    say(train, "--config", file).refuses(2, str(file), *parts)
    say(train, "--config", tmp_path / "absent.yaml").refuses(2, "absent.yaml does not exist")


def test_wrong_data_files_are_named(tmp_path, run_dir, say):
    empty, short, binary, absent = (tmp_path / name for name in ("empty.txt", "short.txt", "binary.txt", "absent.txt"))
    empty.write_text("\n")
    short.write_text("a b\n\nc d\n")
    binary.write_bytes(b"\xff\xfe\x00")

    def refuses(path, *parts):
        said = say(train, *arguments({"data.source": "text", "data.path": path}, dir=tmp_path / "run"))
        said.refuses(2, "data.path", str(path), *parts)

    refuses(absent, "existing file")
    refuses(empty, "holds no text")
    refuses(short, "data.seq_len 16", "give more text")
    refuses(binary, "not UTF-8")
    say(evaluate, run_dir, "--data.path", absent).refuses(2, str(absent), "does not exist")
    say(evaluate, run_dir, "--data.path", empty).refuses(2, str(empty), "holds no text")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [evaluate, generate, inspect])
def test_a_run_that_is_none(command, tmp_path, run_dir, say):
    said = say(command, tmp_path / "absent", "--json")
    said.refuses(2, str(tmp_path / "absent"))
    assert said.answer["exit_code"] == 2
    say(command, tmp_path).refuses(2, str(tmp_path))
    say(command, run_dir, "--unheard-of", 1).refuses(2, "--unheard-of")
    say(command).refuses(2, "required")


def test_a_depth_or_stack_that_is_not_there(run_dir, say):
    say(evaluate, run_dir, "--depth", 9).refuses(2, "--depth 9", "1 to 3")
    say(generate, run_dir, "--depth", 0).refuses(2, "--depth 0", "1 to 3")
    say(inspect, run_dir, "--stack", 9).refuses(2, "--stack 9", "0, 1, 2")
    say(generate, run_dir, "--temperature", -1).refuses(2, "temperature is -1")
    say(generate, run_dir, "--steps", 4).refuses(2, "--steps", "clm")


# What they refuse to do to a directory.


def test_a_directory_of_another_run_or_of_something_else_is_left_alone(run_dir, tmp_path, say):
    before = content(run_dir)
    changes = SHORT | {"model.d_ff": 64, "optimizer.lr": 0.1}
    said = say(train, *arguments(changes, dir=run_dir))
    said.refuses(2, str(run_dir), "model.d_ff, optimizer.lr differ", "another run.dir")
    say(train, *arguments(SHORT, dir=run_dir, resume="never")).refuses(2, str(run_dir), "run.resume")
    assert content(run_dir) == before

    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "thesis.tex").write_text("chapter 1")
    say(train, *arguments(SHORT, dir=mine)).refuses(2, str(mine), "thesis.tex", "another run.dir")
    say(train, *arguments(SHORT, dir=mine / "thesis.tex")).refuses(2, "thesis.tex is a file")
    assert content(mine) == {"thesis.tex": b"chapter 1"}


def test_a_text_that_has_changed_since(tmp_path, say):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of some text\n\n" for i in range(60)))
    changes = SHORT | {"data.source": "text", "data.path": text, "model.architecture.n_stacks": 1}
    assert say(train, *arguments(changes, dir=tmp_path / "run")).code == 0
    text.write_text(text.read_text() + "one more\n\n")
    before = content(tmp_path / "run")
    say(train, *arguments(changes, dir=tmp_path / "run")).refuses(2, "training text", "data.path")
    assert content(tmp_path / "run") == before


# The traceback, for those who ask for it.


def test_a_traceback_only_with_debug():
    _, err = finish(start("train", "--model.d_modle=3"), code=2)
    assert err == "error: command line: unknown key model.d_modle; the nearest valid one is model.d_model\n"
    process = start("train", "--model.d_modle=3", "--debug")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback (most recent call last)" in err and "UsageError" in err
