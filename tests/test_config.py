"""Configuration: reading YAML and overrides, sentences for mistakes, writing back, the command line."""

from pathlib import Path

import pytest

from stackwise_jax.config import (
    ConfigArgumentParser,
    StackWiseConfig,
    config_from_dict,
    differing_keys,
    load_config,
    resolved_yaml,
    run_directory,
)
from stackwise_jax.config.keys import list_keys, list_names
from stackwise_jax.config.schema import AdapterRow, ObjectiveConfig, PhaseConfig, PlanEntryConfig
from stackwise_jax.errors import UsageError


@pytest.fixture
def write(tmp_path):
    def write_yaml(text: str) -> Path:
        path = tmp_path / "small.yaml"
        path.write_text(text)
        return path

    return write_yaml


def sentence(path=None, overrides=()) -> str:
    with pytest.raises(UsageError) as error:
        load_config(path, overrides)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_yaml_holds_differences(write):
    config = load_config(write("model: {d_model: 64, architecture: {n_stacks: 3}}\nrun:\n"))
    assert differing_keys(StackWiseConfig(), config) == ["model.d_model", "model.architecture.n_stacks"]
    assert config.model.architecture.n_stacks == 3
    assert StackWiseConfig.from_yaml(str(write("run: {seed: 7}"))).run.seed == 7
    assert load_config() == StackWiseConfig()


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".1e-3", "0.0001", "+1e-4"])
def test_exponents_without_a_dot_are_numbers(write, text):
    assert load_config(write(f"optimizer: {{lr: {text}}}")).optimizer.lr == 1e-4
    assert load_config(None, ["--optimizer.lr", text]).optimizer.lr == 1e-4


def test_a_whole_number_becomes_the_float_it_stands_for(write):
    lr = load_config(write("optimizer: {lr: 1}")).optimizer.lr
    assert isinstance(lr, float)


def test_overrides_win_over_the_file_and_the_last_over_the_first(write):
    path = write("model: {d_model: 64, n_heads: 2}")
    config = load_config(path, ["--model.d_model", "32", "--model.d_model=48", "--mesh.data", "-1"])
    assert (config.model.d_model, config.model.n_heads, config.mesh.data) == (48, 2, -1)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("run.name", "3", "3"),
        ("run.name", "null", None),
        ("run.sample_prompt", "a: {b}", "a: {b}"),
        ("run.sample_prompt", "", ""),
        ("model.n_kv_heads", "2", 2),
        ("model.n_kv_heads", "null", None),
        ("model.remat", "true", True),
        ("model.attention_mode", "causal", "causal"),
        ("curriculum.phases", "[{train: [0], lr: 1e-3}]", [PhaseConfig(train=[0], lr=1e-3)]),
        (
            "curriculum.phases",
            "[{path: [0, 1], objective: {kind: mlm}}]",
            [PhaseConfig(path=[0, 1], objective=ObjectiveConfig(kind="mlm"))],
        ),
    ],
)
def test_override_values(key, text, value):
    config = load_config(None, [f"--{key}", text])
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == value


UNKNOWN = [
    ("model: {d_modl: 64}", "model.d_modl", "model.d_model"),
    ("modle: {d_model: 64}", "modle", "model"),
    ("d_model: 64", "d_model", "model.d_model"),
    ("model: {n_stacks: 3}", "model.n_stacks", "model.architecture.n_stacks"),
    ("data: {batchsize: 3}", "data.batchsize", "data.batch_size"),
    ("curriculum: {phases: [{}, {trian: [0]}]}", "curriculum.phases[1].trian", "curriculum.phases[1].train"),
    (
        "curriculum: {phases: [{objective: {kin: mlm}}]}",
        "curriculum.phases[0].objective.kin",
        "curriculum.phases[0].objective.kind",
    ),
]


@pytest.mark.parametrize(("text", "key", "remedy"), UNKNOWN)
def test_unknown_key_names_file_key_and_nearest(write, text, key, remedy):
    path = write(text)
    assert sentence(path).startswith(f"{path}: unknown key {key}; the nearest valid one is {remedy}")


@pytest.mark.parametrize("key", ["model.d_modl", "modle.d_model", "d_model", "modl.d_modle"])
def test_unknown_override_names_the_nearest(key):
    text = sentence(None, [f"--{key}", "64"])
    assert text == f"command line: unknown key {key}; the nearest valid one is model.d_model"


@pytest.mark.parametrize(
    "text",
    [
        "n_blocks: 4",
        "model: {n_blocks: 4}",
        "model: {architecture: {n_stacks: 2, n_blocks: 4}}",
        "curriculum: {phases: [{n_blocks: 4}]}",
    ],
)
def test_the_old_key_is_refused_with_what_to_write(write, text):
    path = write(text)
    remedy = "write model.architecture.n_stacks and model.architecture.blocks_per_stack"
    assert sentence(path).startswith(f"{path}: unknown key ") and sentence(path).endswith(remedy)
    assert sentence(None, ["--model.architecture.n_blocks", "4"]).endswith(remedy)
    with pytest.raises(UsageError, match=remedy):
        config_from_dict({"model": {"architecture": {"n_blocks": 4}}})


WRONG = [
    ("model: {d_model: wide}", 'model.d_model is "wide"; write a whole number'),
    ("model: {d_model: 64.5}", "model.d_model is 64.5; write a whole number"),
    ("model: {d_model: true}", "model.d_model is true; write a whole number"),
    ("model: {d_model: }", "model.d_model is null; write a whole number"),
    ("model: {d_model: [64]}", "model.d_model is [64]; write a whole number"),
    ("model: {n_kv_heads: two}", 'model.n_kv_heads is "two"; write a whole number or null'),
    ("model: {remat: 1}", "model.remat is 1; write true or false"),
    ("optimizer: {lr: fast}", 'optimizer.lr is "fast"; write a number'),
    ("optimizer: {lr: true}", "optimizer.lr is true; write a number"),
    ("objective: {kind: lm}", 'objective.kind is "lm"; write one of clm, mlm, diffusion'),
    ("model: 3", "model is 3; write keys below it, such as d_model, "),
    ("- model", 'the file is ["model"]; write keys below it, such as run, '),
    ("curriculum: {phases: 3}", "curriculum.phases is 3; write a list of entries"),
    ("curriculum: {phases: [3]}", "curriculum.phases[0] is 3; write keys below it, such as name, "),
    ("curriculum: {phases: [{train: 0}]}", "curriculum.phases[0].train is 0; write a list of whole numbers"),
    ("curriculum: {phases: [{train: [a]}]}", 'curriculum.phases[0].train is ["a"]; write a list of whole numbers'),
    ("model.d_model: 64", "model.d_model is written with dots; in YAML write each section on its own line"),
]


@pytest.mark.parametrize(("text", "expected"), WRONG)
def test_wrong_type_names_file_key_value_and_remedy(write, text, expected):
    path = write(text)
    assert sentence(path).startswith(f"{path}: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty; write the keys"),
        ("# only a comment\n", "is empty; write the keys"),
        ("model: {d_model: 64\n", "this is no valid YAML"),
        ("model:\n  d_model: 64\n n_heads: 4\n", "line 3: this is no valid YAML"),
        ("model:\n\td_model: 64\n", "line 2: this is no valid YAML"),
        ("model: {d_model: 1}\nmodel: {n_heads: 2}\n", "line 2: the key model stands twice"),
        ("model: !!python/object/apply:os.getcwd []", "line 1: tags are not read here"),
    ],
)
def test_broken_files(write, text, expected):
    path = write(text)
    assert sentence(path).startswith(str(path)) and expected in sentence(path)


def test_missing_binary_and_directory_as_files(tmp_path):
    assert sentence(tmp_path / "no.yaml").startswith(f"{tmp_path / 'no.yaml'} does not exist")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in sentence(tmp_path / "binary.yaml")
    assert "cannot be read (Is a directory)" in sentence(tmp_path)


@pytest.mark.parametrize("overrides", [["--model.remat"], ["--model.remat", "--run.seed", "1"]])
def test_override_without_a_value(overrides):
    assert sentence(None, overrides).startswith("command line: --model.remat has no value; write ")


def test_a_value_alone_is_no_override():
    assert sentence(None, ["model.d_model"]) == "command line: 'model.d_model' stands alone; write --section.key value"


def test_there_and_back(write):
    phases = "[{train: [0], steps: 3, objective: {kind: mlm, mask_fraction: 0.2}}, {name: 'no', train: [1]}]"
    config = load_config(
        None,
        ["--curriculum.phases", phases, "--run.name", "1e-4", "--run.sample_prompt", "é: #\n", "--optimizer.eps=1e-9"],
    )
    assert load_config(write(resolved_yaml(config))) == config
    assert config_from_dict(config.to_dict()) == config
    assert config_from_dict({}) == StackWiseConfig()


def test_the_resolved_yaml_names_every_key():
    import yaml

    resolved = yaml.safe_load(resolved_yaml(StackWiseConfig()))
    for key in list_keys():
        value = resolved
        for name in key.name.split("."):
            value = value[name]
        assert value == key.default, key.name


def test_differing_keys_look_into_phases():
    a = load_config(None, ["--curriculum.phases", "[{train: [0]}, {train: [1]}]"])
    b = load_config(None, ["--curriculum.phases", "[{train: [0]}, {train: [2], steps: 3}]", "--run.seed=1"])
    assert differing_keys(a, b) == ["run.seed", "curriculum.phases[1].steps", "curriculum.phases[1].train"]
    assert differing_keys(a, a) == []


@pytest.mark.parametrize(
    ("overrides", "path", "expected"),
    [
        ([], None, "runs/default"),
        ([], "configs/quickstart.yaml", "runs/quickstart"),
        (["--run.name", "mine"], "configs/quickstart.yaml", "runs/mine"),
        (["--run.name", "mine", "--run.dir", "/tmp/here"], "configs/quickstart.yaml", "/tmp/here"),
    ],
)
def test_run_directory(overrides, path, expected):
    assert run_directory(load_config(None, overrides), path) == Path(expected)


def make_parser() -> ConfigArgumentParser:
    parser = ConfigArgumentParser("train", "Train a rack.")
    parser.add_config_arguments()
    parser.add_argument("--dry-run", action="store_true", help="train nothing")
    return parser


def test_the_command_line_splits_options_from_overrides():
    options = make_parser().parse_args(
        ["--model.d_model", "32", "--config", "a.yaml", "--mesh.data", "-1", "--run.seed=3", "--dry-run"]
    )
    assert (options.config, options.dry_run, options.print_config) == (["a.yaml"], True, False)
    assert options.overrides == ["--model.d_model", "32", "--mesh.data", "-1", "--run.seed=3"]
    assert load_config(None, options.overrides).mesh.data == -1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dryrun"], "unknown option --dryrun; the nearest valid one is --dry-run"),
        (["--dry"], "unknown option --dry; the nearest valid one is --dry-run"),
        (["--d_model", "3"], "unknown option --d_model; the nearest valid one is --model.d_model"),
        (["--modle.d_model=3"], "unknown option --modle.d_model; the nearest valid one is --model.d_model"),
        (["--n_blocks", "3"], "unknown option --n_blocks; write --model.architecture.n_stacks and "),
        (["--config"], "argument --config: expected one argument; -h shows what can be written"),
        (["stray"], "unrecognized arguments: stray; -h shows what can be written"),
    ],
)
def test_mistakes_in_options(arguments, expected):
    with pytest.raises(UsageError) as error:
        make_parser().parse_args(arguments)
    assert str(error.value).startswith(f"command line: {expected}")


def test_help_shows_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(["-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "--dry-run" in text
    for key in list_keys():
        assert f"--{key.name} " in text, key.name
    assert "--model.d_model D_MODEL" in text and "a whole number; default 128)" in text


def test_every_key_has_a_comment_in_the_schema():
    keys = list_keys() + list_keys(PhaseConfig, "curriculum.phases[i].")
    keys += list_keys(PlanEntryConfig, "curriculum.plans[i].") + list_keys(AdapterRow, "curriculum.adapters.table[i].")
    assert [key.name for key in keys if not key.comment] == []


def test_names_hold_sections_and_keys():
    names = list_names()
    assert len(names) == len(set(names))
    assert {"model", "model.architecture", "model.architecture.n_stacks", "curriculum.phases"} <= set(names)
    assert {key.name for key in list_keys()} <= set(names)
