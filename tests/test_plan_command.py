"""The command plan, and what train does with a run that does not fit."""

import json
from pathlib import Path

import pytest
from tiny import TINY

from stackwise_jax import plan, train

CONFIGS = Path(__file__).parent.parent / "configs"
SHORT = [f"--{change}" for change in TINY]


@pytest.fixture
def say(capsys):
    """say(command, *arguments): (exit code, stdout, stderr, the last line as JSON)."""

    def run(command, *arguments):
        code = command.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        last = out.strip().splitlines()[-1] if out.strip() else "null"
        return code, out, err, json.loads(last) if last.startswith("{") else None

    return run


@pytest.mark.parametrize("name", ["llama_70b_h200", "llama_70b_h200_128k"])
def test_the_70b_configurations(name, say):
    machine = "--device", "h200", "--host", "100GiB", "--disk", "60GB"
    code, out, _, answer = say(plan, "--config", CONFIGS / f"{name}.yaml", *machine, "--json")
    assert code == 0 and answer["fits"] is True
    assert answer["peak_device_bytes"] < 35e9
    assert answer["peak_host_bytes"] < 100 * 2**30
    assert answer["peak_disk_bytes"] < 60e9
    assert len(answer["phases"]) == 80 and {"device", "host", "disk", "flops", "seconds"} <= set(answer["phases"][0])
    assert "stack 1 .. stack 79 (79 phases)" in out and "it fits" in out and "of the device's peak" in out


def test_host_and_disk_of_another_machine_are_not_those_of_this_one(say):
    config = "--config", CONFIGS / "llama_70b_h200.yaml", "--device", "h200", "--json"
    _, out, _, answer = say(plan, *config)
    assert answer["fits"] is True and "host not limited, disk not limited" in out
    assert say(plan, *config, "--host", "64GiB")[3]["fits"] is False


def test_what_does_not_fit_comes_with_what_would_help(say):
    # End to end and resident, the weights alone are 6.7 GB in bf16.
    config = "--config", CONFIGS / "llama_7b_24gb.yaml", "--memory.offload", "none"
    code, out, _, answer = say(plan, *config, "--device", "20GB", "--host", "64GiB", "--disk", "200GB", "--json")
    assert code == 0 and answer["fits"] is False and answer["seconds"] is None
    assert "does not fit: phase 'rack' needs" in out and "it fits with: --" in out
    assert answer["fits_with"]["fits"] and answer["changes"][0]["peak_device_bytes"] < answer["peak_device_bytes"]


def test_advice(say):
    machine = "--device", "rtx4090", "--host", "64GiB", "--disk", "200GB"
    code, out, _, answer = say(plan, *SHORT, *machine, "--advise", "--json")
    assert code == 0 and answer["ways"][0]["name"] == "end to end, resident"
    assert "the first that fits: end to end, resident" in out
    assert all(way["days_per_billion_tokens"] > 0 for way in answer["ways"])


def test_this_machine_by_default_and_by_name(say):
    answers = [say(plan, *SHORT, *how, "--json")[3] for how in ((), ("--device", "cpu"))]
    assert answers[0]["peak_device_bytes"] == answers[1]["peak_device_bytes"] and answers[0]["device"] == "cpu"
    assert answers[0]["phases"][0]["sources"]["device"]["activations"] == "compiled"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--device", "h300"], 'memory.device is "h300"; write one of h200, a100-80, rtx4090, t4, cpu, or a size'),
        (["--host", "many"], 'memory.host is "many"; write a size such as'),
        (["--memory.disk", "x"], 'memory.disk is "x"; write a size such as'),
        (["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, say):
    code, out, err, _ = say(plan, *arguments)
    assert code == 2 and out == "" and sentence in err and len(err.splitlines()) == 1


def test_train_refuses_what_cannot_fit_before_it_writes_anything(say, tmp_path):
    run = *SHORT, "--run.dir", tmp_path / "run", "--memory.host", "100MB"
    code, _, err, _ = say(train, *run)
    assert code == 2 and "error: the run does not fit: phase" in err and "100" not in err.split("where")[0]
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_ended_is_not_asked_whether_it_fits(say, tmp_path):
    run = *SHORT, "--run.dir", tmp_path / "run", "--curriculum.steps", "1", "--run.sample_tokens", "0"
    assert say(train, *run)[0] == 0
    code, out, err, _ = say(train, *run, "--memory.host", "100MB")
    assert code == 0 and "there is nothing left to do" in out + err


@pytest.mark.parametrize("check", ["warn", "off"])
def test_train_warns_or_is_silent_where_it_is_told_to(check, say, tmp_path):
    run = *SHORT, "--run.dir", tmp_path / "run", "--memory.host", "100MB", "--curriculum.steps", "1"
    code, out, err, _ = say(train, *run, "--memory.check", check, "--run.sample_tokens", "0")
    assert code == 0 and ("does not fit" in out + err) is (check == "warn")


@pytest.mark.parametrize("text", ["built in", "not there"])
@pytest.mark.parametrize("key", ["run.init_from", "curriculum.adapters.load_from", "run.dir"])
def test_a_run_that_was_changed_is_not_planned_with(key, text, say, tmp_path):
    run = tmp_path / "run"
    short = *SHORT, "--curriculum.plan=append", "--curriculum.trunk=adapt", "--curriculum.steps=1"
    assert say(train, *short, "--run.dir", run, "--run.sample_tokens=0")[0] == 0
    rack = (run / "rack.json").read_text()
    (run / "rack.json").write_text(rack.replace("10000.0", "20000.0"))
    more = [] if text == "built in" else ["--data.source=text", f"--data.path={tmp_path / 'none.txt'}"]
    place = [] if key == "run.dir" else ["--run.dir", tmp_path / "new"]
    code, _, err, _ = say(plan, *short, *more, *place, f"--{key}={run}")
    assert code == 1 and "rack.json is not as it was" in err


def test_a_run_that_is_not_there_yet_can_be_planned_with(say, tmp_path):
    assert say(plan, *SHORT, "--run.dir", tmp_path / "new", "--run.init_from", tmp_path / "none")[0] == 0
