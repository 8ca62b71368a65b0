"""stackwise_jax.inspect: what it says about runs, stores, items and damage, and what it does not read."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from stackwise_jax.checkpoint import Progress, Store, items
from stackwise_jax.config import config_from_dict, resolved_yaml
from stackwise_jax.errors import UsageError
from stackwise_jax.inspect import main
from stackwise_jax.reporting.inspection import inspect_path
from stackwise_jax.reporting.inspection_text import sparkline

D, L, V = 8, 2, 16


def stack_tree(value: float) -> dict:
    return {
        "blocks": {"attn": {"q": {"kernel": np.full((L, D, D), value, np.float32)}}, "scale": np.ones((L, D), "f4")}
    }


def meta(phase: int, step: int, kind: str = "stack") -> dict:
    history = [[s, 5.0 - 0.5 * s] for s in range(0, step, 2)]
    return {
        "kind": kind,
        "phase": f"stack_{phase}",
        "phase_index": phase,
        "step": step,
        "format": "fp32",
        "loss_history": history if kind == "stack" else [],
    }


@pytest.fixture
def run(tmp_path):
    """A run of two phases: the first ended, the second was saved at step 4 of 8."""
    directory = tmp_path / "run"
    directory.mkdir()
    config = {
        "model": {"d_model": D, "n_heads": 2, "architecture": {"n_stacks": 2, "blocks_per_stack": L}},
        "objective": {"kind": "clm"},
        "curriculum": {"plan": "stackwise"},
    }
    (directory / "config.yaml").write_text(resolved_yaml(config_from_dict(config)))
    phases = [
        {"name": f"stack_{i}", "path": list(range(i + 1)), "train": [i], "train_head": True, "steps": 8} for i in (0, 1)
    ]
    (directory / "phases.json").write_text(json.dumps(phases))
    store = Store(directory / "checkpoints", keep=2)
    result = {"versions": {}, "name": "stack_0", "held_out_loss": 2.5, "bits_per_byte": 3.25, "seconds": 61.0}
    store.save_item("stacks/000", 1, stack_tree(2.0), meta(0, 8))
    store.save_item("embed", 1, {"embedding": np.ones((V, D), np.float32)}, meta(0, 8, "embed"))
    versions = {"stacks/000": 1, "embed": 1}
    store.commit(Progress(1, 1, 0, 8, versions, results=[result]))
    store.save_item("stacks/001", 2, stack_tree(3.0), meta(1, 4))
    store.commit(Progress(2, 1, 4, 12, versions | {"stacks/001": 2}, results=[result]))
    store.close()
    return directory


def answer(capsys, *argv) -> tuple[int, dict, str]:
    code = main([*map(str, argv), "--json"])
    out = capsys.readouterr().out
    return code, json.loads(out.splitlines()[-1]), out


def test_a_run_says_where_it_stands(run, capsys):
    code, report, text = answer(capsys, run)
    assert code == 0
    assert report["kind"] == "run" and not report["finished"]
    assert report["state"] == "phase 2 of 2 ('stack_1'), step 4 of 8"
    assert [phase["state"] for phase in report["phases"]] == ["done", "at step 4"]
    assert report["phases"][0]["bits_per_byte"] == 3.25
    assert "versions" not in report["phases"][0]
    assert report["config"]["model"]["d_model"] == D
    assert [record["number"] for record in report["records"]] == [1, 2]
    for said in (report["state"], "2 stacks of 2 blocks", "stack_1", "3.2500", "2x8x8", "float32", "5.000 -> 2.000"):
        assert said in text


def test_items_have_shapes_bytes_versions_and_their_phase(run, capsys):
    _, report, _ = answer(capsys, run)
    by_name = {item["name"]: item for item in report["items"]}
    assert sorted(by_name) == ["embed", "stacks/000", "stacks/001"]
    first, second = by_name["stacks/000"], by_name["stacks/001"]
    assert first["leaves"][0] == {"name": "blocks/attn/q/kernel", "shape": [L, D, D], "dtype": "float32", "bytes": 512}
    assert (first["values"], first["bytes"]) == (L * D * D + L * D, 4 * (L * D * D + L * D))
    assert first["disk_bytes"] > 0
    assert (first["version"], first["phase"], first["records"]) == (1, "stack_0", [1, 2])
    assert (second["version"], second["phase"], second["records"]) == (2, "stack_1", [2])
    assert second["loss_history"] == [{"step": 0, "loss": 5.0}, {"step": 2, "loss": 4.0}]


def test_a_finished_run_says_so(run, capsys):
    store = Store(run / "checkpoints")
    store.commit(Progress(3, 2, 0, 16, {"stacks/000": 1}, finished=True, results=[{"name": "a"}, {"name": "b"}]))
    store.close()
    _, report, _ = answer(capsys, run)
    assert report["finished"] and report["state"] == "finished after 16 steps"
    assert [phase["state"] for phase in report["phases"]] == ["done", "done"]


def test_stack_picks_one_stack(run, capsys):
    _, report, text = answer(capsys, run, "--stack", 1)
    assert [item["name"] for item in report["items"]] == ["stacks/001"]
    assert "embed  " not in text


@pytest.mark.parametrize("norms", [False, True])
def test_arrays_are_read_for_norms_only(run, capsys, monkeypatch, norms):
    reads = []
    load = items.load_tree
    monkeypatch.setattr(items, "load_tree", lambda path, like: reads.append(path) or load(path, like))
    _, report, text = answer(capsys, run, "--stack", 0, *(["--norms"] if norms else []))
    (item,) = report["items"]
    assert len(reads) == norms
    assert ("norm" in item) == norms
    if norms:
        kernel, scale = item["leaves"]
        assert kernel["norm"] == pytest.approx(2.0 * np.sqrt(L * D * D))
        assert item["norm"] == pytest.approx(np.hypot(kernel["norm"], scale["norm"]))
        assert f"norm {kernel['norm']:.4g}" in text


@pytest.mark.parametrize(
    ("below", "kind", "names"),
    [
        ("checkpoints", "store", ["embed", "stacks/000", "stacks/001"]),
        ("checkpoints/stacks/001", "item", ["stacks/001"]),
        ("checkpoints/stacks/001/00000002", "item", ["stacks/001"]),
        ("checkpoints/embed", "item", ["embed"]),
    ],
)
def test_a_path_may_be_a_store_an_item_or_a_version(run, capsys, below, kind, names):
    _, report, _ = answer(capsys, run / below)
    assert report["kind"] == kind
    assert [item["name"] for item in report["items"]] == names


def test_a_run_killed_before_its_first_checkpoint(run, capsys):
    shutil.rmtree(run / "checkpoints")
    code, report, _ = answer(capsys, run)
    assert code == 0
    assert report["state"] == "nothing saved yet"
    assert [phase["state"] for phase in report["phases"]] == ["to come", "to come"]


@pytest.mark.parametrize("what", ["meta", "record", "config", "arrays"])
def test_damage_is_one_sentence_and_the_rest_is_shown(run, capsys, what):
    version = run / "checkpoints/stacks/000/00000001"
    if what == "arrays":
        shutil.rmtree(version / "arrays")
    else:
        files = {"meta": version / "meta.json", "record": run / "checkpoints/progress/00000001.json"}
        damaged = files.get(what, run / "config.yaml")
        damaged.write_bytes(damaged.read_bytes()[:-40] + b"{")
    code = main([str(run), "--norms", "--json"])
    captured = capsys.readouterr()
    assert code == 1
    assert "stacks/001" in captured.out
    failure = json.loads(captured.out.splitlines()[-1])
    assert failure["exit_code"] == 1
    assert str(run) in failure["error"]
    assert len(captured.err.strip().splitlines()) == 1
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("change", ["missing", "a link"])
def test_files_are_looked_for_where_no_array_is_read(run, capsys, change):
    arrays = run / "checkpoints/stacks/001/00000002/arrays"
    arrays.rename(run.parent / "elsewhere")
    if change == "a link":
        arrays.symlink_to(run.parent / "elsewhere")
    assert main([str(run)]) == 1
    error = capsys.readouterr().err
    assert str(arrays) in error and ("symbolic link" if change == "a link" else "is missing") in error


def test_a_damaged_version_named_directly_fails(run, capsys):
    version = run / "checkpoints/stacks/001/00000002"
    (version / "meta.json").write_text("{")
    assert main([str(version)]) == 1
    assert str(version / "meta.json") in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/stacks/001", "checkpoints/stacks/001/00000002"])
def test_a_file_that_no_item_lists_is_named_without_norms(run, capsys, below):
    stray = run / "checkpoints/stacks/001/00000002/arrays/checkpoint"
    stray.write_text("{}")
    assert main([str(run / below)]) == 1
    assert f"{stray} is not part of the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_files_of_the_run_are_compared_from_its_store_too(run, below):
    store = Store(run / "checkpoints")
    wrong = {"config.yaml": "0" * 64}
    store.commit(Progress(3, 1, 4, 12, {"stacks/000": 1}, digests=wrong))
    store.close()
    assert any("config.yaml is not as it was" in sentence for sentence in inspect_path(run / below)["damage"])


def test_wrong_paths_and_stacks_are_refused(run, tmp_path, capsys):
    with pytest.raises(UsageError, match="does not exist"):
        inspect_path(tmp_path / "none")
    with pytest.raises(UsageError, match="holds no run"):
        inspect_path(tmp_path)
    with pytest.raises(UsageError, match="there are: 0, 1"):
        inspect_path(run, stack=7)
    with pytest.raises(UsageError, match="leave --stack out"):
        inspect_path(run / "checkpoints/embed", stack=0)
    assert main([str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_sparkline_is_short_and_ordered():
    assert sparkline([]) == ""
    assert sparkline([1.0]) == "▁"
    assert sparkline([2.0, 1.0, 1.0]) == "█▁▁"
    line = sparkline(list(range(1000)), width=8)
    assert line == "▁▂▃▄▅▆▇█"
