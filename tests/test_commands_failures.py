"""What the commands say, and keep, when files are damaged, replaced or the disk is full; and how a run then goes on."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from processes import SHORT, Said, arguments, assert_same_end, content, environment, finish, progress, start

from stackwise_jax.checkpoint import Store
from stackwise_jax.engine.recorder import Recorder
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


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory) -> Path:
    """A run that was broken off in its second phase, with two records; tests work on copies."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    save_inside = Recorder.save_inside

    def save_and_stop(recorder, learned, opt, meta, *where):
        save_inside(recorder, learned, opt, meta, *where)
        if meta["phase_index"] == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "save_inside", save_and_stop)
        assert train(arguments(SHORT, dir=path)) == 130
    return path


@pytest.fixture
def copy(broken_off, tmp_path) -> Path:
    return shutil.copytree(broken_off, tmp_path / "copy")


def test_a_tokenizer_that_does_not_fit(run_dir, copy, tmp_path, say):
    changes = SHORT | {"tokenizer.kind": "sentencepiece"}
    say(train, *arguments(changes, dir=run_dir)).refuses(2, str(run_dir), "tokenizer.kind", "another run.dir")

    saved = json.loads((copy / "tokenizer" / "tokenizer.json").read_text())
    (copy / "tokenizer" / "tokenizer.json").write_text(json.dumps(saved | {"kind": "file"}))
    (copy / "tokenizer" / "tokenizer.model").write_text("no model")
    for command, *argv in ([evaluate, copy], [generate, copy], [train, *arguments(SHORT, dir=copy)]):
        say(command, *argv).refuses(1, str(copy / "tokenizer"), "is not as it was", "restore")


def test_a_sound_tokenizer_of_another_run(tmp_path, say):
    """The same kind and the same number of pieces, learned from another text: its ids would mean nothing."""
    dirs = []
    for name in ("first", "second"):
        text = tmp_path / f"{name}.txt"
        text.write_text("".join(f"{name} {i * i} {name[::-1]} of {i}\n\n" for i in range(80)))
        changes = {"data.source": "text", "data.path": text, "model.architecture.n_stacks": 1, "curriculum.steps": 1}
        changes |= {"tokenizer.kind": "sentencepiece", "tokenizer.vocab_size": 290}
        dirs.append((tmp_path / name, changes))
        assert say(train, *arguments(changes, dir=tmp_path / name)).code == 0
    (first, changes), (second, _) = dirs
    shutil.rmtree(first / "tokenizer")
    shutil.copytree(second / "tokenizer", first / "tokenizer")
    for command, *argv in ([evaluate, first], [generate, first], [train, *arguments(changes, dir=first)]):
        say(command, *argv).refuses(1, str(first / "tokenizer"), "is not as it was", "restore")


# What breaks on the way.


@pytest.mark.parametrize("damage", ["cut", "removed", "not a word of it left"])
def test_a_damaged_checkpoint_is_named_and_the_advice_leads_on(damage, copy, run_dir, say):
    last = progress(copy)
    assert last is not None and last.phase == 1
    item = Store(copy / "checkpoints").path("stacks/001", last.versions["stacks/001"])
    victim = max((path for path in item.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    elif damage == "removed":
        victim.unlink()
    else:
        victim.write_bytes(b"")
    record = copy / "checkpoints" / "progress" / f"{last.number:08d}.json"
    before = content(copy)
    for command, *argv in ([evaluate, copy], [generate, copy], [train, *arguments(SHORT, dir=copy)]):
        said = say(command, *argv)
        said.refuses(1, str(victim), f"remove {record} to go on from record {last.number - 1}")
    assert content(copy) == before
    record.unlink()
    assert say(train, *arguments(SHORT, dir=copy)).code == 0
    assert_same_end(copy, run_dir)


def test_a_half_written_record_is_passed_over(copy, run_dir, say):
    last = progress(copy)
    assert last is not None
    record = copy / "checkpoints" / "progress" / f"{last.number:08d}.json"
    record.write_bytes(record.read_bytes()[:100])
    assert say(inspect, copy).code in (0, 1)
    said = say(train, *arguments(SHORT, dir=copy))
    assert said.code == 0
    assert_same_end(copy, run_dir)


def test_a_run_directory_without_its_configuration_or_with_a_broken_one(copy, say):
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text[: len(text) // 2])
    for command, *argv in ([evaluate, copy], [train, *arguments(SHORT, dir=copy)]):
        said = say(command, *argv)
        assert said.code in (1, 2) and str(copy) in said.err and said.err.count("\n") == 1
    (copy / "config.yaml").unlink()
    say(evaluate, copy).refuses(2, str(copy), "config.yaml")
    before = content(copy)
    say(train, *arguments(SHORT, dir=copy)).refuses(2, str(copy), "another run.dir")
    assert content(copy) == before


@contextlib.contextmanager
def files_up_to(n_bytes: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [200, 20_000])
def test_a_disk_that_takes_no_more(limit, copy, run_dir, tmp_path, say):
    """200 bytes: not even a line of metrics fits; 20,000: no array does."""
    new = tmp_path / "new"
    for directory in (new, copy):
        with files_up_to(limit):
            said = say(train, *arguments(SHORT, dir=directory))
        said.refuses(1, "cannot", str(directory), "the disk is full", "same command again")
        assert say(train, *arguments(SHORT, dir=directory)).code == 0
        assert_same_end(directory, run_dir)


def test_a_full_disk_of_a_run_with_curves(tmp_path, run_dir):
    """A real file system with too little room, TensorBoard files and a spill file included."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options: str) -> int:
        if not shutil.which("mount"):
            return 1
        return subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", disk], capture_output=True).returncode

    if mount("-o", "size=900k"):
        pytest.skip("no right to mount a small file system")
    try:
        argv = arguments(SHORT | {"run.tensorboard": "true"}, dir=disk / "run")
        _, err = finish(start("train", *argv), code=1)
        assert "the disk is full" in err and str(disk / "run") in err and "same command again" in err
        assert err.count("error: ") == 1
        assert mount("-o", "remount,size=64m") == 0
        finish(start("train", *argv))
        last = progress(disk / "run")
        assert last is not None and last.finished
        assert (disk / "run" / "metrics.jsonl").read_bytes() == (run_dir / "metrics.jsonl").read_bytes()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_two_runs_in_one_directory(copy, say):
    """The second is refused while the first writes."""
    process = start("train", *arguments(SHORT | {"curriculum.steps": 4}, dir=copy), env=environment())
    holder = Store(copy / "checkpoints")
    try:
        while process.poll() is None and not list((copy / "checkpoints").rglob("*.tmp")):
            pass
        if process.poll() is None:
            say(train, *arguments(SHORT, dir=copy)).refuses(1, "another run is writing", "another run.dir")
    finally:
        process.communicate()
        holder.close()
