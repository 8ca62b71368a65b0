"""Runs whose files are moved, copied or changed while they last: what goes on, where, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import content, environment
from tiny import losses, stop_inside, tiny, train

from stackwise_jax.checkpoint import Store
from stackwise_jax.config import load_config, load_written, run_directory
from stackwise_jax.curriculum import overruled
from stackwise_jax.engine import Run, entries, load_rack, prepare
from stackwise_jax.engine.directory import check_directory, open_store
from stackwise_jax.engine.source import Source
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.evaluation import held_out_text
from stackwise_jax.reporting.inspection import inspect_path
from stackwise_jax.train import main

PLAN = ["curriculum.plan=append", "model.architecture.n_stacks=2"]
KEYS = [*PLAN, "run.save_every=1"]
NAMES = ["rack.json", "config.yaml", "phases.json", "tokenizer/tokenizer.json"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was broken off in its second phase."""
    path = tmp_path_factory.mktemp("stopped") / "run"
    stop_inside(tiny(*KEYS), path)
    return path


@pytest.fixture
def begun(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped, tmp_path / "begun")


def write_file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["changed", "removed"])
def test_a_file_that_changes_while_a_run_trains_ends_it_at_the_next_record(name, how, begun):
    run = Run(prepare(tiny(*KEYS), begun))
    progress = run._open()
    kept = (begun / name).read_bytes()
    (begun / name).unlink() if how == "removed" else (begun / name).write_bytes(kept + b" ")
    with pytest.raises(RunError, match=rf"{name} is (not as it was|missing).*; restore it from a copy"):
        run.recorder.commit(progress.phase, progress.step, extra=progress.extra)
    run.recorder.close()
    assert Store(begun / "checkpoints").latest() == progress
    (begun / name).write_bytes(kept)
    assert Source(begun).progress == progress


def test_a_record_that_is_a_link_is_not_passed_over(begun, tmp_path):
    newest = max((begun / "checkpoints" / "progress").glob("*.json"))
    newest.rename(tmp_path / "record")
    newest.symlink_to(tmp_path / "record")
    for opened in (Source, inspect_path, lambda run_dir: prepare(tiny(*KEYS), run_dir)):
        with pytest.raises(UsageError, match=f"{newest.name} is a symbolic link"):
            opened(begun)


@pytest.mark.parametrize("stored", [True, False])
def test_the_configuration_in_a_run_names_the_folder_that_it_lies_in(stored, begun, tmp_path, monkeypatch):
    """stored: with the run.dir and the name that earlier versions wrote down."""
    config = begun / "config.yaml"
    if stored:
        text = config.read_text()
        assert "dir: null\n  name: null" in text
        config.write_text(text.replace("dir: null\n  name: null", "dir: /old/place\n  name: old"))
    monkeypatch.chdir(begun)
    for files in (config, "config.yaml", [config], [write_file(tmp_path / "a.yaml", "run: {dir: x}"), config]):
        found, written = load_written(files)
        assert run_directory(found, files) == begun
        assert any("/old/place" in note for note in overruled(found, written)) == stored
    for files, overrides in (
        ([config], ["--run.dir=y"]),
        ([config, write_file(tmp_path / "b.yaml", "run: {dir: y}")], []),
    ):
        found, written = load_written(files, overrides)
        assert run_directory(found, files) == Path("y") and not written.notes
    shutil.copytree(begun, tmp_path / "second")
    with pytest.raises(UsageError, match="configurations of 2 runs"):
        load_written([config, tmp_path / "second" / "config.yaml"])
    (begun / "rack.json").unlink()  # no run
    assert run_directory(load_config("config.yaml"), "config.yaml") == Path("/old/place" if stored else "runs/config")


def test_a_copy_goes_on_in_its_own_place(begun, stopped):
    before = content(stopped)
    assert main(["--config", str(begun / "config.yaml")]) == 0
    assert Store(begun / "checkpoints").latest().finished and content(stopped) == before


@pytest.fixture
def moved(tmp_path) -> tuple[Path, Callable]:
    """A finished run on a text that has moved since, and the setup of the run with the text at a path."""
    text = "".join(f"line {i} of some text\n\n" for i in range(60))
    run_dir, here, there = tmp_path / "run", tmp_path / "here.txt", tmp_path / "there.txt"
    here.write_text(text)
    keys = [*PLAN, "data.source=text", "curriculum.steps=1"]
    again = lambda path=there: prepare(tiny(*keys, f"data.path={path}"), run_dir)
    Run(again(here)).train()
    here.rename(there)
    return there, again


def test_a_text_that_has_moved_is_found_there_from_then_on(moved, tmp_path):
    run_dir, (there, again) = tmp_path / "run", moved
    with pytest.raises(UsageError, match=r"data\.path"):
        held_out_text(load_rack(run_dir))
    Run(again()).train()
    assert load_config(run_dir / "config.yaml").data.path == str(there)
    assert len(held_out_text(load_rack(run_dir))) > 0
    before = content(run_dir)
    Run(again()).train()  # nothing has moved since
    assert content(run_dir) == before
    assert "config.yaml.next" not in Store(run_dir / "checkpoints").latest().digests


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_kill_while_places_are_written_down_locks_nobody_out(killed, moved, tmp_path, monkeypatch):
    """Killed before the first record, between it and config.yaml, and between that and the second record."""
    run_dir, (_, again) = tmp_path / "run", moved
    done = []

    def until_killed(write):
        def step(*args):
            if len(done) == killed:
                raise KeyboardInterrupt
            done.append(write(*args))

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", until_killed(Store.commit))
        patch.setattr("stackwise_jax.engine.directory.write", until_killed(entries.write))
        with pytest.raises(KeyboardInterrupt):
            open_store(again())
    assert len(done) == killed and Source(run_dir).progress.finished
    Run(again()).train()
    newest = Store(run_dir / "checkpoints").latest()
    assert newest.finished and newest.digests == entries.digests(run_dir)
    assert len(held_out_text(load_rack(run_dir))) > 0


def test_where_a_run_started_from_may_be_left_out_once_it_has_been_taken_over(stopped, tmp_path):
    source, run_dir = shutil.copytree(stopped, tmp_path / "source"), tmp_path / "run"
    short = ["curriculum.plan=joint", "model.architecture.n_stacks=2", "curriculum.steps=1"]
    train(tiny(*short, f"run.init_from={source}", "run.init_depth=1"), run_dir)
    shutil.rmtree(source)
    assert check_directory(prepare(tiny(*short), run_dir))
    with pytest.raises(UsageError, match=r"run\.init_from"):
        prepare(tiny(*short, f"run.init_from={source}"), tmp_path / "new")
    assert load_config(run_dir / "config.yaml").run.init_from == str(source)


def test_adapters_that_have_yet_to_be_taken_are_those_that_the_run_was_begun_with(tmp_path):
    adapt = [*PLAN, "curriculum.trunk=adapt", "curriculum.steps=1"]
    train(tiny(*adapt), tmp_path / "source")
    given = f"curriculum.adapters.load_from={tmp_path / 'source'}"
    run = Run(prepare(tiny(*adapt, given), tmp_path / "run"))
    run._open()
    run.recorder.close()
    left_out = prepare(tiny(*adapt), tmp_path / "run").adapters
    assert left_out is not None and left_out.run_dir == tmp_path / "source"


ON_TWO = "import sys, pathlib, tiny as t; t.stop_inside(t.tiny(*sys.argv[2:]), pathlib.Path(sys.argv[1]))"


@pytest.mark.slow
def test_a_run_of_two_devices_goes_on_on_one(stopped, tmp_path):
    run_dir = tmp_path / "run"
    env = environment(devices=2) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", ON_TWO, str(run_dir), *KEYS, "mesh.fsdp=2"], env=env, check=True, timeout=300)
    newest = Store(run_dir / "checkpoints").latest()
    assert load_config(run_dir / "config.yaml").mesh.fsdp == 2 and (newest.phase, newest.step) == (1, 1)
    train(tiny(*KEYS, "mesh.fsdp=1"), run_dir)
    train(tiny(*KEYS), alone := shutil.copytree(stopped, tmp_path / "alone"))
    assert losses(run_dir) == pytest.approx(losses(alone), rel=1e-4)
