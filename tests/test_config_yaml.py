"""YAML as people write it: the core schema of version 1.2, the same on the command line, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest

from stackwise_jax.config import (
    StackWiseConfig,
    config_from_dict,
    config_from_yaml,
    load_config,
    load_written,
    resolved_yaml,
    validate,
    yaml_text,
)
from stackwise_jax.config.bounds import ENTRIES
from stackwise_jax.config.loading import MOST_BYTES
from stackwise_jax.config.schema import ObjectiveConfig, OptimizerConfig, PhaseConfig
from stackwise_jax.config.yaml_text import MOST_LEVELS, parse_yaml
from stackwise_jax.errors import UsageError


def read(text: str, where: str = "a.yaml"):
    return config_from_yaml(text.encode(), where)


def refused(call, *arguments) -> str:
    with pytest.raises(UsageError) as error:
        call(*arguments)
    text = str(error.value)
    assert "\n" not in text and len(text) < 1000
    return text


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("run.seed", "010", 10),
        ("run.seed", "0o10", 8),
        ("run.seed", "0x1F", 31),
        ("run.seed", "+7", 7),
        ("optimizer.lr", "1e-4", 1e-4),
        ("optimizer.lr", "1.", 1.0),
        ("optimizer.lr", ".5", 0.5),
        ("optimizer.lr", "010", 10.0),
        ("model.remat", "True", True),
        ("model.n_kv_heads", "~", None),
        ("model.n_kv_heads", "NULL", None),
        ("memory.check", "off", "off"),
        ("run.name", "null", None),
        ("run.name", "on", "on"),
        ("run.name", "no", "no"),
        ("run.name", "1:30", "1:30"),
        ("run.name", "010", "010"),
        ("run.name", "2024-01-01", "2024-01-01"),
        ("run.name", "1_000", "1_000"),
        ("run.name", "=", "="),
        ("objective.levels", "[1, .5]", [1.0, 0.5]),
        ("run.init_stacks", "[010, 0x2]", [10, 2]),
    ],
)
def test_a_text_means_the_same_in_a_file_and_on_the_command_line(key, text, value):
    section, name = key.split(".")
    for config in (read(f"{section}: {{{name}: {text}}}"), load_config(None, [f"--{key}={text}"])):
        found = getattr(getattr(config, section), name)
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("run.seed", "1:30"),
        ("run.seed", "1_000"),
        ("run.seed", "0b11"),
        ("run.seed", "1e3"),
        ("run.seed", "true"),
        ("run.seed", "9" * 5000),
        ("run.seed", "2024-01-01"),
        ("model.remat", "yes"),
        ("model.remat", "off"),
        ("model.remat", "1"),
        ("optimizer.lr", "1_0.5"),
        ("optimizer.lr", "1:30.5"),
        ("run.init_stacks", "[1_0]"),
        ("run.init_stacks", "3"),
        ("run.init_stacks", "{a: 1}"),
    ],
)
def test_what_only_yaml_1_1_reads_is_refused_with_its_key(key, text):
    section, name = key.split(".")
    assert key in refused(read, f"{section}: {{{name}: {text}}}")
    assert key in refused(load_config, None, [f"--{key}={text}"])


def test_quotes_make_text():
    assert read("run: {name: 'null', sample_prompt: \"3\"}").run.name == "null"
    assert 'run.seed is "3"; write a whole number' in refused(read, "run: {seed: '3'}")
    assert 'model.remat is "true"' in refused(read, 'model: {remat: "true"}')
    assert "run.sample_prompt is null; write text" in refused(read, "run: {sample_prompt: null}")
    assert load_config(None, ["--run.sample_prompt=null"]).run.sample_prompt == "null"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ('run.name="null"', "null"),
        ("run.name='it''s'", "it's"),
        ('run.name="', '"'),
        ('run.name=a"b"', 'a"b"'),
        ('run.sample_prompt="a\\nb"', "a\nb"),
        ("objective.kind='mlm'", "mlm"),
    ],
)
def test_quotes_on_the_command_line_are_those_of_yaml(override, value):
    section, name = override.partition("=")[0].split(".")
    assert getattr(getattr(load_config(None, [f"--{override}"]), section), name) == value


def test_what_is_wrong_in_quotes_on_the_command_line_is_refused():
    assert 'run.seed is "3"; write a whole number' in refused(load_config, None, ["--run.seed='3'"])
    text = refused(load_config, None, ['--run.sample_prompt="a" and "b"'])
    assert text.startswith("command line: run.sample_prompt, line 1: this is no valid YAML")


@pytest.mark.parametrize("key", ["curriculum.stages", "curriculum.frozen_stacks"])
def test_a_list_whose_lines_are_all_commented_out_is_left_out(key, tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("curriculum: {stages: [{steps: 3}], frozen_stacks: [bf16]}")
    second.write_text(f"curriculum:\n  {key.partition('.')[2]}:\n  # - bf16\n")
    assert load_config(second) == StackWiseConfig()
    config, written = load_written([first, second])
    assert config == load_config(first) and key in written.keys
    assert f"{key} is null; write a list" in refused(load_config, None, [f"--{key}="])


@pytest.mark.parametrize("name", ["null", "~", "", "1e3", "0o10", "on", "- x", "a: b", "#", "*x", "&x", "!x", "é\n\tx"])
def test_every_text_comes_back_from_a_stored_configuration(name):
    config = config_from_dict({"run": {"sample_prompt": name, "name": name}})
    assert read(resolved_yaml(config)) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "run: &a {seed: 1}\ndata: *a",
            "a.yaml, line 1: anchors and aliases are not read here; write values",
        ),
        ("run: &a [*a]", "anchors and aliases"),
        ("run: *a", "anchors and aliases"),
        (
            "base: 1\nrun: {<<: {seed: 1}}",
            "a.yaml, line 2: merge keys (<<) are not read here; write the keys",
        ),
        ("? [run]\n: 1", "a list or a section stands where a key has to be"),
        ("? {run: 1}\n: 1", "a list or a section stands where a key has to be"),
        ("{[a, b]: 1}", "a list or a section stands where a key has to be"),
        (": 1", "this is no valid YAML"),
        ("'': 1", "there is no key before the colon"),
        ("3: 1", "unknown key 3"),
        ("true: 1", "unknown key true"),
        ("run: !!set {seed}", "line 1: tags are not read here"),
        ("run: !!binary aGk=", "line 1: tags are not read here"),
        ("run: !!python/name:os.system x", "line 1: tags are not read here"),
        ("run: {seed: !!int 3}", "line 1: tags are not read here"),
        ("run: {seed: 1}\n---\nrun: {seed: 2}", "line 2: a second document begins, which is not read here; write one"),
        ("run:\n\tseed: 1", "line 2"),
        ("run: {name: 'a\0b'}", "line 1: this is no valid YAML (the character U+0000)"),
        ("run: " + "[" * 100_000, "nesting"),
        ("- " * 50_000 + "a", f"more than {MOST_LEVELS} levels of nesting"),
        ("run: " + "{a: " * 3_000 + "}" * 3_000, "nesting"),
        ("run: {seed: 1, seed: 2}", "the key seed stands twice"),
    ],
)
def test_what_a_configuration_does_not_need_is_refused(text, expected):
    assert expected in refused(read, text)


def test_a_bomb_of_values_ends_early(monkeypatch):
    monkeypatch.setattr(yaml_text, "MOST_NODES", 1000)
    assert "more than 1,000 values" in refused(parse_yaml, "[" + "1," * 1010 + "]", "a")


@pytest.mark.parametrize(
    "text", ["[" * 5000, "[&a 1, *a]", "[{a: [*b]}]", "!!python/name:os.system", "[1\0]", "[\ud800]"]
)
def test_a_list_on_the_command_line_is_read_with_the_same_care(text):
    assert refused(load_config, None, [f"--curriculum.stages={text}"]).startswith("command line: curriculum.stages")


def with_phases(count: int, **given) -> StackWiseConfig:
    config = load_config(None, ["--curriculum.plan=custom"])
    phases = [PhaseConfig(steps=i + 1, **given) for i in range(count)]
    return dataclasses.replace(config, curriculum=dataclasses.replace(config.curriculum, phases=phases))


def test_many_entries_are_read_in_seconds():
    start = time.process_time()
    assert len(read("curriculum:\n  stages:\n" + "  - {steps: 3, lr: 0.1}\n" * 5000).curriculum.stages) == 5000
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("count", "given"),
    [
        (1500, {"objective": ObjectiveConfig(), "optimizer": OptimizerConfig()}),
        pytest.param(ENTRIES, {"objective": ObjectiveConfig(), "optimizer": OptimizerConfig()}, marks=pytest.mark.slow),
    ],
)
def test_a_long_plan_is_read_back_from_what_a_run_writes(count, given, tmp_path):
    config = with_phases(count, **given)
    validate(config)
    path = tmp_path / "config.yaml"
    path.write_text(resolved_yaml(config))
    assert path.stat().st_size > 2**20
    assert load_config(path) == config


def test_what_is_too_large_to_be_read_back_is_not_written():
    text = refused(resolved_yaml, with_phases(200, name="x" * 100_000))
    assert f"at most {MOST_BYTES:,} are read; write shorter lists and texts" in text


def test_encodings(tmp_path):
    text = "run: {name: größe}\n"
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode("utf-8-sig"))
    assert load_config(path).run.name == "größe"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        path.write_bytes(text.encode(encoding))
        assert refused(load_config, path) == f"{path} is not UTF-8 text but looks like UTF-16; save it as UTF-8"
    path.write_bytes(text.encode("latin-1"))
    assert "line 1: the file is not UTF-8 text" in refused(load_config, path)


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").write_bytes(b"#" * (MOST_BYTES + 1))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, why in {
        "pipe": "not a regular file",
        "huge": "at most",
        "loop": "symbolic links",
        "x" * 300: "too long",
    }.items():
        text = refused(load_config, tmp_path / name)
        assert "cannot be read" in text and why in text
    assert "cannot be read" in refused(load_config, "a\0b")
    assert "does not exist" in refused(load_config, tmp_path / "none")


def test_several_files_merge_in_order_and_lists_replace(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model: {d_model: 64, d_ff: 96}\ncurriculum: {stages: [{lr: 0.1}, {steps: 3}]}\n")
    second.write_text("model: {d_ff: 32}\ncurriculum: {stages: [{steps: 5}]}\n")
    config, written = load_written([first, second], ["--run.seed=4"])
    assert (config.model.d_model, config.model.d_ff) == (64, 32)
    assert [(stage.lr, stage.steps) for stage in config.curriculum.stages] == [(None, 5)]
    assert load_config([second, first]).model.d_ff == 96
    expected = {"model.d_model", "model.d_ff", "curriculum.stages", "curriculum.stages[0].steps", "run.seed"}
    assert written.keys == expected


def test_a_resolved_section_does_not_say_that_the_user_wrote_its_defaults(tmp_path):
    config = load_config(None, ["--cache.read_ahead=5"])
    path = tmp_path / "config.yaml"
    path.write_text(resolved_yaml(config))
    assert load_written(path)[1].keys == {"cache.read_ahead"}


def test_home_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ["run.dir", "run.init_from", "data.path", "data.valid_path", "tokenizer.path", "cache.dir"]
    keys.append("curriculum.adapters.load_from")
    (tmp_path / "a.yaml").write_text("data: {path: ~/x}")
    config = load_config("~/a.yaml", [f"--{key}=~/there" for key in keys if key != "data.path"]).to_dict()
    for key in keys:
        value = config
        for name in key.split("."):
            value = value[name]
        assert value == str(tmp_path / ("x" if key == "data.path" else "there")), key
    assert load_config(None, ["--run.sample_prompt=~/x"]).run.sample_prompt == "~/x"
    assert load_config(None, ["--run.dir=~"]).run.dir == str(tmp_path)


@pytest.mark.parametrize(
    "override",
    [
        "run.sample_prompt=a\udcffb",
        "run.sample_prompt=a\x00b",
        "run.sample_prompt=\x1b[31m",
        "run.name=a\udcff",
        "run.name=a\nb",
        f"run.name={'x' * 256}",
        f"run.dir={'x' * 256}",
        f"run.dir={'x/' * 3000}",
        "run.dir=a\0b",
        "data.text_key=\x07",
        "mesh.coordinator=\udc80:3",
    ],
)
def test_texts_that_cannot_work_are_refused_at_the_start(override):
    key = override.partition("=")[0]
    text = refused(validate, load_config(None, [f"--{override}"]))
    assert text.startswith(f"{key} is ") and text.isprintable()


def test_a_stored_configuration_is_checked_without_its_files(tmp_path):
    config = load_config(None, ["--data.source=text", "--data.path=/no/such", "--data.valid_path=/no/such"])
    validate(config, files=False)
    assert "data.path" in refused(validate, config)
    assert "data.path" in refused(lambda: validate(load_config(None, ["--data.source=text"]), files=False))
    config = load_config(None, ["--tokenizer.kind=file", "--tokenizer.path=/no/such.model"])
    validate(config, files=False)
    assert "tokenizer.path" in refused(validate, config)
    os.mkfifo(tmp_path / "pipe")
    config = load_config(None, ["--data.source=text", f"--data.path={tmp_path / 'pipe'}"])
    assert "neither a file nor a folder" in refused(validate, config)
    long = Path("x" * 300)
    config = load_config(None, ["--data.source=text", f"--data.path={long}"])
    assert "data.path" in refused(validate, config)
