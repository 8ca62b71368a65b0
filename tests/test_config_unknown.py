"""What is said about keys and options that do not exist: their name here, near ones, or what there is."""

from __future__ import annotations

import re

import pytest

from stackwise_jax.config import CommandParser, ConfigArgumentParser, config_from_dict, load_config
from stackwise_jax.config.command_line import number, path, whole_number, whole_numbers
from stackwise_jax.config.keys import hint_of
from stackwise_jax.config.synonyms import SYNONYMS
from stackwise_jax.config.unknown import advice
from stackwise_jax.errors import UsageError


def refused(call, *arguments) -> str:
    with pytest.raises(UsageError) as error:
        call(*arguments)
    return str(error.value)


def parsed(*arguments: str):
    parser = ConfigArgumentParser("train", "Train a rack.")
    parser.add_config_arguments()
    parser.add_argument("--dry-run", action="store_true", help="train nothing")
    parser.add_argument("--device", help="a size")
    return parser.parse_args(list(arguments))


@pytest.mark.parametrize("name", SYNONYMS)
def test_a_synonym_is_no_key_and_its_answer_names_keys_that_exist(name):
    assert hint_of(name) is None and name == name.lower()
    sections = "run|data|tokenizer|model|objective|curriculum|optimizer|cache|memory|mesh"
    for key in re.findall(rf"(?<![\w.-])(?:{sections})(?:\.[a-z_0-9]+)+", SYNONYMS[name]):
        assert hint_of(key) is not None, key


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("optimizer.learning_rate", "optimizer.lr"),
        ("model.num_layers", "model.architecture.n_stacks"),
        ("hidden_size", "model.d_model"),
        ("model.num_heads", "model.n_heads"),
        ("model.context_length", "data.seq_len"),
        ("model.block_size", "data.seq_len"),
        ("data.max_length", "data.seq_len"),
        ("model.dtype", "model.compute_dtype"),
        ("epochs", "curriculum.steps"),
        ("dataset", "data.path"),
        ("optimizer.betas", "optimizer.b1 and optimizer.b2"),
        ("weight_decay", "optimizer.weight_decay"),
        ("batch_size", "data.batch_size"),
        ("seed", "run.seed"),
        ("training.training_architecture", "curriculum.plan"),
        ("training.progressive.trunk_strategy", "curriculum.trunk"),
        ("progressive.cache_activations", "cache.kind"),
        ("training.progressive.new_stack_precision", "model.compute_dtype"),
        ("training.progressive.building_mode", "curriculum.plan append"),
        ("training.fusion_mode", "curriculum.plan fusion"),
        ("training.time_interpretation", "objective.time"),
        ("training.end_to_end_scope", "curriculum.plan"),
        ("training.qlora.rank", "curriculum.adapters.rank"),
        ("Training.Learning-Rate", "optimizer.lr"),
        ("load_in_4bit", "curriculum.frozen nf4"),
        ("model.kind", "write tokenizer.kind, objective.kind or cache.kind"),
        ("curriculum.n_stacks", "model.architecture.n_stacks"),
    ],
)
def test_what_people_type_is_answered_with_the_key_here(key, answer):
    given: dict = {}
    inner = given
    *sections, name = key.split(".")
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = 1
    for text in (refused(config_from_dict, given), refused(load_config, None, [f"--{key}=1"])):
        assert answer in text and "unknown" in text


def test_a_section_of_another_program_is_answered_key_by_key():
    given = {"training": {"lr": 1, "progressive": {"trunk_strategy": "qlora"}, "max_steps": 3, "nonsense_xyz": 1}}
    text = refused(config_from_dict, given)
    assert "unknown section training; for training.lr write optimizer.lr" in text
    assert "for training.progressive.trunk_strategy write curriculum.trunk" in text
    assert "for training.max_steps write curriculum.steps" in text and "nonsense" not in text


def test_only_close_names_are_called_near():
    assert advice("model.d_modle") == "the nearest valid one is model.d_model"
    assert advice("modle.d_modle") == "the nearest valid one is model.d_model"
    assert advice("qwertz") is None
    text = refused(config_from_dict, {"cache": {"qwertz": 1}})
    assert text.endswith("unknown key cache.qwertz; cache has the keys kind, host_budget, disk_budget, dir, read_ahead")
    assert refused(config_from_dict, {"qwertz": 1}).endswith(
        "the sections are run, data, tokenizer, model, objective, curriculum, optimizer, cache, memory, mesh"
    )


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["model.d_model=64"], "write --model.d_model=64"),
        (["+model.d_model=64"], "write --model.d_model=64"),
        (["model=encoder/tiny"], "write --config FILE for a group of settings"),
        (["learning_rate=3"], "write optimizer.lr"),
        (["--multirun"], "one command trains one run"),
        (["-m"], "one command trains one run"),
        (["--config-name=x"], "write --config FILE"),
        (["--config-name", "x"], "write --config FILE"),
        (["--learning-rate", "1"], "write --optimizer.lr"),
        (["--d-model=3"], "the nearest valid one is --model.d_model"),
        (["--no-remat"], "write --model.remat false"),
        (["--no_tensorboard"], "write --run.tensorboard false"),
        (["--print-config"], "the nearest valid one is --print_config"),
        (["configs/quickstart.yaml"], "write --config configs/quickstart.yaml"),
        (["--qwertz"], "-h shows what can be written"),
        (["-x"], "-h shows what can be written"),
        (["--model={}"], "such as --model.d_model"),
        (["\x1b[31m=3"], "has no dashes before it"),
        ([f"--{'x' * 5000}"], "-h shows"),
    ],
)
def test_the_ways_of_other_programs_get_a_sentence(arguments, answer):
    text = refused(parsed, *arguments)
    assert answer in text and text.isprintable() and len(text) < 600


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--model.d-model", "3"], "write model.d_model"),
        (["--model.no_remat"], "write model.remat false"),
        (["--run.nme", "x"], "the nearest valid one is run.name"),
    ],
)
def test_keys_of_known_sections_are_answered_when_they_are_read(arguments, answer):
    assert answer in refused(load_config, None, parsed(*arguments).overrides)


def test_config_may_be_repeated_and_values_that_look_like_options_are_values():
    options = parsed("--config", "a.yaml", "--config=b.yaml", "--run.sample_prompt=--dry", "--device", "model=x")
    assert options.config == ["a.yaml", "b.yaml"] and options.device == "model=x"
    assert load_config(None, options.overrides).run.sample_prompt == "--dry"


def test_an_option_that_is_given_twice_is_named(capsys):
    parsed("--device", "a", "--device=b")
    assert capsys.readouterr().err == 'note: --device is given 2 times; the last one, "b", counts\n'
    parsed("--device", "a", "--device=a", "--config", "a", "--config", "b")
    assert capsys.readouterr().err == ""


def test_the_types_of_options(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = CommandParser("generate")
    parser.add_argument("run", type=path)
    parser.add_argument("--seed", type=whole_number(0, 9))
    parser.add_argument("--sizes", type=whole_numbers(1, 9))
    parser.add_argument("--temperature", type=number)
    options = parser.parse_args(["~/run", "--seed", "3", "--sizes", "1,2", "--temperature", "1e-3"])
    assert (options.run, options.seed, options.sizes, options.temperature) == ("/home/me/run", 3, (1, 2), 1e-3)
    for option, text in {
        "--seed": ["10", "-1", "1e3", "9" * 5000, "x", "1_0", "٣"],
        "--sizes": ["0", "1,,2", "1,10", "1," * 20_000 + "1"],
        "--temperature": ["nan", "inf", "1e999", "x", "1_0"],
    }.items():
        for value in text:
            said = refused(parser.parse_args, ["run", f"{option}={value}"])
            assert said.startswith(f"command line: argument {option}: ") and len(said) < 500
    assert "is no path" in refused(parser.parse_args, ["a\0b"])
    assert "the nearest valid one is --temperature" in refused(parser.parse_args, ["run", "--temperatur=1"])
    assert refused(parser.parse_args, ["run", "--lr=1"]).endswith("unknown option --lr; -h shows what can be written")
