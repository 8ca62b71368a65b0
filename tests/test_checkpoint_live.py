"""A store while a run writes it: read beside it, moved or removed under it, in paths with odd names."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from processes import SHORT, arguments, environment, finish, start

from stackwise_jax.checkpoint import MetricsLog, Progress, Store, arrays, items
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.reporting.inspection import inspect_path

ODD = ["a[1]", "a[!x]*?", "b\\c", "gs: x", "x.__lock", "{a,b} $HOME %20 #;|~", "né\n", "...", "-"]


def tree_of(seed):
    return {"kernel": np.random.default_rng(seed).standard_normal((16, 16)).astype(np.float32), "n": np.int32(seed)}


def record(number, versions):
    return Progress(number=number, phase=0, step=number, global_step=number, versions=versions)


def advance(store, number):
    store.save_item("stacks/000", number, tree_of(number), {"phase": "a"})
    store.commit(record(number, {"stacks/000": number}))


@pytest.mark.parametrize("name", ODD)
def test_a_store_works_in_a_directory_of_any_name(tmp_path, name):
    store = Store(tmp_path / name / "checkpoints", keep=1)
    for number in (1, 2):
        advance(store, number)
    store.close()
    again = Store(tmp_path / name / "checkpoints")
    assert again.hold() == record(2, {"stacks/000": 2})
    assert again.load_item("stacks/000", 2)["n"] == 2 and again.item_meta("stacks/000", 2) == {"phase": "a"}
    assert inspect_path(tmp_path / name / "checkpoints", norms=True)["damage"] == []
    assert sorted(os.listdir(tmp_path)) == [name]  # nothing was written beside it


@pytest.mark.parametrize("name", ["gs:", "s3:", "https:", "x" * 256, "é" * 130, "/".join(["x" * 200] * 20), "a\0b"])
def test_a_directory_that_cannot_hold_a_store_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(UsageError, match=r"URL|longer|NUL"):
        Store(tmp_path / "new" / name / "checkpoints").lock()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["run", "run/checkpoints", "run/checkpoints/.lock"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_store_that_was_moved_away_ends_the_run_with_a_sentence(tmp_path, what, replaced):
    store = Store(tmp_path / "run" / "checkpoints")
    advance(store, 1)
    (tmp_path / what).rename(tmp_path / "moved")
    if replaced:
        if what.endswith(".lock"):
            (tmp_path / what).touch()
        else:
            Store(tmp_path / "run" / "checkpoints").save_item("stacks/000", 1, tree_of(5), {})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match="checkpoints was moved, removed or replaced while this run was writing it"):
        store.save_item("stacks/000", 2, tree_of(2), {})
    with pytest.raises(RunError, match="moved, removed or replaced"):
        store.commit(record(2, {"stacks/000": 1}))
    assert sorted(tmp_path.rglob("*")) == before
    store.close()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("what", ["stacks/000/00000001/arrays", "stacks/000/00000001/arrays/n/0", "stacks"])
def test_a_record_never_names_an_item_of_which_something_is_missing(tmp_path, what):
    store = Store(tmp_path / "run")
    advance(store, 1)
    (tmp_path / "run" / what).rename(tmp_path / "moved")
    store.save_item("stacks/001", 2, tree_of(2), {})
    with pytest.raises(RunError, match=r"is missing, so .*00000002\.json cannot be committed"):
        store.commit(record(2, {"stacks/000": 1, "stacks/001": 2}))
    assert store.records() == [1]


def lose(path):
    """What a save leaves behind that lost a file without a word, as Orbax's merge of a database did."""
    (path / "kernel" / "0.0").unlink()


def shorten(path):
    os.truncate(path / "kernel" / "0.0", 100)


def mix_up(path):
    (path / "kernel" / "0.0").write_bytes(bytes(16 * 16 * 4))


@pytest.mark.parametrize("fault", [lose, shorten, mix_up])
def test_what_was_written_is_read_before_it_gets_its_name(tmp_path, monkeypatch, fault):
    store, save = Store(tmp_path / "run"), arrays.save_arrays
    advance(store, 1)

    def faulty(path, leaves):
        save(path, leaves)
        fault(path)

    monkeypatch.setattr(items, "save_arrays", faulty)
    with pytest.raises(RunError, match=r"kernel"):
        advance(store, 2)
    assert store.items() == {"stacks/000": [1]} and store.records() == [1]


def test_a_lock_on_nothing_leaves_nothing(tmp_path):
    store = Store(tmp_path / "new" / "run" / "checkpoints")
    store.lock()
    assert store.items() == {} and store.latest() is None
    store.close()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    store = Store(tmp_path / "run" / "checkpoints")
    store.lock()
    store.close()
    assert os.listdir(tmp_path / "run") == ["mine"]
    advance(store, 1)
    store.close()
    assert store.records() == [1]


def test_a_process_that_locks_first_keeps_others_out_before_anything_is_written(tmp_path):
    store = Store(tmp_path / "run" / "checkpoints")
    store.lock()
    code = "import sys; from stackwise_jax.checkpoint import Store; Store(sys.argv[1]).lock()"
    command = [sys.executable, "-c", code, str(store.directory)]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 1 and "another run is writing" in done.stderr
    store.close()
    assert list(tmp_path.iterdir()) == []


# Readers beside a run.


def test_what_a_reader_holds_stays_until_it_lets_go(tmp_path):
    writer, reader = Store(tmp_path, keep=1), Store(tmp_path)
    advance(writer, 1)
    assert reader.hold() == record(1, {"stacks/000": 1})
    for number in (2, 3):
        advance(writer, number)
    assert writer.records() == [1, 3] and writer.items() == {"stacks/000": [1, 3]}  # and no more than that
    assert reader.load_item("stacks/000", 1)["n"] == 1
    reader.close()
    advance(writer, 4)
    assert writer.records() == [4] and writer.items() == {"stacks/000": [4]}
    assert reader.hold() == record(4, {"stacks/000": 4})
    del reader
    advance(writer, 5)
    assert writer.records() == [5]


def test_reading_needs_no_right_to_write(tmp_path):
    advance(store := Store(tmp_path / "run"), 1)
    store.close()
    for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
        path.chmod(0o500 if path.is_dir() else 0o400)
    (tmp_path / "run").chmod(0o500)
    try:
        reader = Store(tmp_path / "run")
        assert reader.hold() == record(1, {"stacks/000": 1}) and reader.load_item("stacks/000", 1)["n"] == 1
    finally:
        for path in (tmp_path / "run", *(tmp_path / "run").rglob("*")):
            path.chmod(0o700)


def test_without_locks_a_reader_is_told_that_the_run_has_gone_on(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError("no locks on this file system")

    monkeypatch.setattr("stackwise_jax.checkpoint.locks.fcntl.flock", unsupported)
    writer, reader = Store(tmp_path, keep=1), Store(tmp_path)
    advance(writer, 1)
    assert reader.hold() == record(1, {"stacks/000": 1})
    advance(writer, 2)
    with pytest.raises(RunError, match="is missing; the run has gone on since; run the same command again"):
        reader.load_item("stacks/000", 1)


def test_readers_beside_a_writer_that_keeps_one_record_all_succeed(tmp_path):
    writer, done = Store(tmp_path, keep=1), threading.Event()
    advance(writer, 1)

    def write():
        number = 1
        while not done.is_set():
            number += 1
            advance(writer, number)
        return number

    def read():
        store = Store(tmp_path)
        progress = store.hold()
        done.wait(0.1)  # as long as several records take
        version = progress.versions["stacks/000"]
        assert store.load_item("stacks/000", version)["n"] == version
        report = inspect_path(tmp_path)
        assert report["damage"] == [] and report["records"] and report["items"]

    with ThreadPoolExecutor(5) as pool:
        writing = pool.submit(write)
        try:
            for future in [pool.submit(read) for _ in range(60)]:
                future.result()
        finally:
            done.set()
        assert writing.result() > 10
    advance(writer, writing.result() + 1)
    assert len(writer.records()) == 1 and len(writer.items()["stacks/000"]) == 1


@pytest.mark.slow
def test_commands_beside_a_trainer_that_keeps_one_record_all_succeed(tmp_path):
    run = tmp_path / "run[1]"
    line = arguments({"curriculum.steps": 100000}, keep=1, save_every=1, eval_every=0, log_every=10000, dir=run)
    trainer = start("train", *line, env=environment(compiled=tmp_path / "compiled"))
    try:
        for _ in range(600):
            if max(Store(run / "checkpoints").records(), default=0) > 3:  # all is compiled
                break
            threading.Event().wait(0.1)
        commands = {
            "evaluate": (),
            "inspect": ("--norms",),
            "generate": ("--prompt", "1", "--max_tokens", "2"),
        }
        for command, more in [*commands.items()] * 3:
            assert trainer.poll() is None
            before = Store(run / "checkpoints").latest()
            finish(start(command, str(run), *more, env=environment(compiled=tmp_path / "compiled")))
            after = Store(run / "checkpoints").latest()
            assert after.number > before.number  # the run went on, and removed what was the newest before
        assert trainer.poll() is None
    finally:
        trainer.kill()
        trainer.communicate()


@pytest.mark.slow
def test_commands_work_in_a_directory_of_any_name(tmp_path):
    run, out, env = tmp_path / "a[1]*?\\b" / "run", tmp_path / "c[2]", environment(compiled=tmp_path / "compiled")
    finish(start("train", *arguments(SHORT, dir=run), env=env))
    finish(start("convert", str(run), str(out), "--format", "int8", env=env))
    for directory in (run, out):
        finish(start("evaluate", str(directory), env=env))
        finish(start("inspect", str(directory), "--norms", env=env))
    moved = run.rename(tmp_path / "b]\\[")
    finish(start("generate", str(moved), "--prompt", "1", "--max_tokens", "2", env=env))


# metrics.jsonl under a run.


@pytest.mark.parametrize("replaced", [False, True])
def test_metrics_that_were_removed_end_the_run_with_a_sentence(tmp_path, replaced):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsLog(path)
    metrics.append({"step": 1})
    metrics.sync()
    path.unlink()
    if replaced:
        path.write_text("")
    metrics.append({"step": 2})
    with pytest.raises(RunError, match=r"metrics\.jsonl was moved, removed or replaced while this run was writing it"):
        metrics.sync()
    assert path.exists() == replaced and (not replaced or path.read_text() == "")
