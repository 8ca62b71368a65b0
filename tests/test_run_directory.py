"""What is checked before a run directory is used: who may go on in it, what has changed, what somebody else made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import content
from tiny import saved, stop_inside, tiny, train

from stackwise_jax.checkpoint import Store
from stackwise_jax.checkpoint.files import read_json, write_json
from stackwise_jax.config import load_config
from stackwise_jax.engine import Run, load_rack, prepare
from stackwise_jax.engine.directory import check_directory, open_store
from stackwise_jax.engine.source import Source
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.evaluation import held_out_text
from stackwise_jax.files import SMALL
from stackwise_jax.reporting.inspection import inspect_path

PLAN = ["curriculum.plan=append", "model.architecture.n_stacks=2"]
HERE = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    train(tiny(*PLAN), path)
    return path


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was broken off in its second phase."""
    path = tmp_path_factory.mktemp("stopped") / "run"
    stop_inside(tiny(*PLAN, "run.save_every=1"), path)
    return path


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def begun(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped, tmp_path / "begun")


def openers(run_dir: Path) -> list[Callable[[], object]]:
    """Every way to begin to use a run."""
    other = run_dir.parent / "other"
    return [
        lambda: prepare(tiny(*PLAN), run_dir),
        lambda: Source(run_dir),
        lambda: prepare(tiny("curriculum.plan=joint", f"run.init_from={run_dir}"), other),
        lambda: prepare(tiny(*PLAN, "curriculum.trunk=adapt", f"curriculum.adapters.load_from={run_dir}"), other),
    ]


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def change_records(run_dir: Path, edit: Callable[[dict], object]) -> None:
    for path in (run_dir / "checkpoints" / "progress").glob("*.json"):
        data = read_json(path)
        edit(data["progress"])
        write_json(path, data)


def as_version_0_1(run_dir: Path) -> Path:
    """Records without digests, phases without what a plan is read back from."""
    change_records(run_dir, lambda progress: progress.pop("digests"))
    rows = json.loads((run_dir / "phases.json").read_text())
    for row in rows:
        del row["stack_sizes"], row["existing"]
    (run_dir / "phases.json").write_text(json.dumps(rows))
    return run_dir


# Files that have changed.

CHANGES = {
    "rack.json": ('"rope_theta": 10000.0', '"rope_theta": 20000.0'),
    "config.yaml": ("batch_size: 4", "batch_size: 8"),
    "phases.json": ('"steps": 3', '"steps": 4'),
    "tokenizer/tokenizer.json": ('"kind"', ' "kind"'),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_named_by_whatever_opens_the_run(name, copy):
    change(copy / name, *CHANGES[name])
    for opened in openers(copy):
        with pytest.raises(RunError, match=rf"{name} is not as it was .* restore it from a copy"):
            opened()
    assert any(name in sentence for sentence in inspect_path(copy)["damage"])
    (copy / name).unlink()
    with pytest.raises((RunError, UsageError), match=f"{name} is missing; restore|no config.yaml"):
        Source(copy)


def test_records_of_version_0_1_load_and_the_next_one_has_digests(begun, finished):
    as_version_0_1(begun)
    assert Source(begun).plan == Source(finished).plan
    train(tiny(*PLAN, "run.save_every=1"), begun)
    newest = Store(begun / "checkpoints").latest()
    assert newest.digests.keys() == {"config.yaml", "rack.json", "phases.json", "tokenizer/tokenizer.json"}
    assert (begun / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    change(begun / "phases.json", '"steps": 3', '"steps": 4')
    with pytest.raises(RunError, match="not as it was"):
        Source(begun)


def test_text_without_ends_of_documents_is_left_to_version_0_1(copy, tmp_path):
    change_records(as_version_0_1(copy), lambda progress: progress["data"].pop("text_format"))
    loaded = load_rack(copy)
    remedy = r"begun by version 0\.1 .* no end token.* --data\.path.*run\.init_from"
    with pytest.raises(UsageError, match=remedy):
        held_out_text(loaded)
    with pytest.raises(UsageError, match=remedy):
        open_store(prepare(tiny(*PLAN), copy))
    (tmp_path / "mine.txt").write_text("a text\n\nof my own")
    assert len(held_out_text(loaded, tmp_path / "mine.txt"))
    assert prepare(tiny("curriculum.plan=joint", f"run.init_from={copy}"), tmp_path / "new").origin is not None


def test_a_plan_of_version_0_1_is_compared_with_the_one_that_is_made(copy):
    as_version_0_1(copy)
    change(copy / "phases.json", '"lr": 0.005', '"lr": 0.5')
    with pytest.raises(UsageError, match=r"phase 'stack 0': optimizer\.lr is 0\.5 in .* and 0\.005 by the config"):
        Source(copy)


# The plan that was recorded.


def test_the_recorded_plan_is_used_and_another_one_refused(stopped, finished, monkeypatch):
    from stackwise_jax.engine import setup

    recorded = Source(finished).plan
    make_plan = setup.make_plan

    def later_version(config, shape):
        plan = make_plan(config, shape)
        phases = [*plan.phases[:-1], plan.phases[-1].__class__(**{**vars(plan.phases[-1]), "train_head": False})]
        return plan.__class__(plan.stack_sizes, tuple(phases), plan.start)

    monkeypatch.setattr(setup, "make_plan", later_version)
    monkeypatch.setattr("stackwise_jax.engine.description.make_plan", later_version)
    assert Source(finished).plan == recorded == Source(stopped).plan
    assert load_rack(finished).phase.train_head
    parts = prepare(tiny(*PLAN, "run.save_every=1"), stopped)
    with pytest.raises(UsageError, match=r"phase 'stack 1': train_head is true in .* and false by the configuration"):
        check_directory(parts)


# Who may go on.

FREE = [
    "run.sample_prompt=Once",
    "run.max_bad_steps=3",
    "model.attention_implementation=reference",
    "model.remat=true",
    "mesh.data=1",
    "memory.check=off",
]


@pytest.mark.parametrize("key", FREE)
def test_keys_that_say_where_and_on_what_are_free(key, stopped):
    assert check_directory(prepare(tiny(*PLAN, "run.save_every=1", key), stopped))


def test_a_run_goes_on_with_other_free_keys_to_nearly_the_same_end(begun, finished):
    train(tiny(*PLAN, *FREE), begun)
    ours, theirs = saved(begun), saved(finished)
    assert ours.keys() == theirs.keys()


def test_weights_may_wait_elsewhere_from_the_next_phase_on(stopped, finished, begun):
    parts = prepare(tiny(*PLAN, "memory.offload=all"), stopped)
    with pytest.raises(UsageError, match=r"inside phase 'stack 1', .* write none until the phase has ended"):
        check_directory(parts)
    assert check_directory(prepare(tiny(*PLAN, "memory.offload=all"), finished))


@pytest.mark.parametrize("key", ["curriculum.steps=4", "model.dropout=0.1", "data.seq_len=8", "optimizer.lr=1"])
def test_keys_that_say_what_is_computed_are_not(key, stopped):
    with pytest.raises(UsageError, match=f"{key.split('=')[0]} differ"):
        check_directory(prepare(tiny(*PLAN, key), stopped))


def test_a_text_is_known_by_its_content_wherever_it_lies(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "text.txt").write_text("".join(f"line {i} of some text\n\n" for i in range(60)))
    text = lambda path: [*PLAN, "data.source=text", "curriculum.steps=1", f"data.path={path}"]
    monkeypatch.chdir(tmp_path / "a")
    train(tiny(*text("text.txt")), Path("../run"))
    stored = load_config(tmp_path / "run" / "config.yaml")
    assert stored.data.path == str(tmp_path / "a" / "text.txt")
    monkeypatch.chdir(tmp_path)
    assert len(held_out_text(load_rack("run"))) > 0  # from another working directory
    assert check_directory(prepare(tiny(*text("a/../a/text.txt")), Path("run")))
    (tmp_path / "a").rename(tmp_path / "b")
    open_store(prepare(tiny(*text("b/text.txt")), Path("run"))).close()
    assert len(held_out_text(load_rack("run"), "b/text.txt")) > 0  # the run's own text need not be there
    (tmp_path / "b" / "text.txt").write_text("".join(f"line {i} of another text\n\n" for i in range(60)))
    with pytest.raises(UsageError, match="training text is not the one"):
        open_store(prepare(tiny(*text("b/text.txt")), Path("run")))


@pytest.mark.parametrize("state", ["new", "begun"])
def test_the_second_of_two_trainers_writes_nothing(state, stopped, tmp_path):
    run_dir = tmp_path / "run"
    if state == "begun":
        shutil.copytree(stopped, run_dir)
    (run_dir / "checkpoints" / "progress").mkdir(parents=True, exist_ok=True)
    (run_dir / "checkpoints" / ".lock").touch()
    run = Run(prepare(tiny(*PLAN), run_dir))
    line = [sys.executable, "-c", HERE, str(run_dir / "checkpoints" / ".lock")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "1\n"
        before = content(run_dir)
        with pytest.raises(RunError, match="another run is writing"):
            run.train()
        assert content(run_dir) == before
        first.communicate("\n")


# What is left when something was removed.


def test_checkpoints_that_are_gone_start_no_other_run(begun):
    shutil.rmtree(begun / "checkpoints")
    before = content(begun)
    with pytest.raises(UsageError, match=r"metrics\.jsonl of a run and no checkpoint; restore checkpoints/"):
        check_directory(prepare(tiny(*PLAN), begun))
    assert content(begun) == before


@pytest.mark.parametrize(("kept", "words"), [(None, "is missing"), (100, "has 100 of")])
def test_metrics_that_are_gone_are_asked_for(kept, words, begun):
    path = begun / "metrics.jsonl"
    path.unlink() if kept is None else path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UsageError, match=rf"metrics\.jsonl {words}.* run\.init_from"):
        check_directory(prepare(tiny(*PLAN, "run.save_every=1"), begun))


def test_a_configuration_that_is_gone_is_asked_for(begun):
    (begun / "config.yaml").unlink()
    with pytest.raises(UsageError, match=r"config\.yaml is missing; restore it from a copy"):
        check_directory(prepare(tiny(*PLAN), begun))


def test_folders_that_a_removed_run_made_again_block_nothing(tmp_path):
    for name in ("offload", "cache", "checkpoints/progress"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / ".lock").touch()
    assert not check_directory(prepare(tiny(*PLAN), tmp_path / "run"))
    (tmp_path / "run" / "checkpoints" / "00000001").mkdir()  # somebody's own
    with pytest.raises(UsageError, match=r"no run \(checkpoints\)"):
        check_directory(prepare(tiny(*PLAN), tmp_path / "run"))


# Directories from strangers.

NAMES = ["metrics.jsonl", "summary.json", "summary.json.tmp", "config.yaml", "rack.json", "phases.json"]
NAMES += ["tokenizer", "tokenizer/tokenizer.json", "checkpoints", "cache", "offload", "tensorboard"]


@pytest.mark.parametrize("name", NAMES)
def test_a_link_in_a_run_is_refused_before_it_is_followed(name, copy, tmp_path):
    target, entry = tmp_path / "target", copy / name
    if entry.exists():
        entry.rename(target)
    elif "." in name:
        target.write_text("precious")
    else:
        target.mkdir()
    entry.symlink_to(target)
    before = content(target) if target.is_dir() else target.read_bytes()
    for opened in openers(copy):
        with pytest.raises(UsageError, match=f"{name} is a symbolic link"):
            opened()
    with pytest.raises(UsageError, match="is a symbolic link"):
        inspect_path(copy)
    assert (content(target) if target.is_dir() else target.read_bytes()) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "rack.json", "phases.json"])
def test_a_pipe_in_a_run_is_not_waited_for(name, copy):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    for opened in (*openers(copy), lambda: inspect_path(copy)):
        with pytest.raises(UsageError, match=f"{name} is no regular file"):
            opened()


def test_the_directory_itself_may_be_a_link(copy, tmp_path):
    (tmp_path / "link").symlink_to(copy)
    assert Source(tmp_path / "link").path == (0, 1)


def test_a_configuration_that_could_not_be_read_back_is_not_written(tmp_path, monkeypatch):
    """Paths are recorded as absolute ones, and the working directory has a name that no key may have."""
    (tmp_path / "a\nb").mkdir()
    monkeypatch.chdir(tmp_path / "a\nb")
    with pytest.raises(UsageError, match=r"cache\.dir is .* which holds control characters"):
        open_store(prepare(tiny(*PLAN, "cache.dir=cache"), Path("run")))
    assert not Path("run").exists()


RACKS = {
    "a million blocks": ('"n_blocks": 1', '"n_blocks": 1000000', "more than 10000 blocks"),
    "no blocks": ('"n_blocks": 1', '"n_blocks": 0', "n_blocks is 0"),
    "a vocabulary of 10^11": ('"vocab_size": 384', '"vocab_size": 100000000000', "vocab_size"),
    "a vocabulary of 10^7": ('"vocab_size": 384', '"vocab_size": 10000000', "'embedding' is float32 of shape"),
    "other blocks": ('"d_ff": 48', '"d_ff": 4800', "rack.json asks for"),
    "an unknown key": ('"d_ff": 48', '"d_ff": 48, "d_fff": 48', "unknown field"),
    "a wrong type": ('"d_ff": 48', '"d_ff": "48"', "d_ff is .* not a whole number"),
    "a number that is none": ('"norm_eps": 1e-06', '"norm_eps": NaN', "norm_eps"),
}


@pytest.mark.parametrize("case", RACKS)
def test_a_rack_that_its_items_do_not_have_is_refused_before_it_is_made(case, copy):
    as_version_0_1(copy)  # somebody who writes a rack can write its digest, too
    old, new, words = RACKS[case]
    change(copy / "rack.json", old, new)
    with pytest.raises((UsageError, RunError), match=words):
        Source(copy)


def test_a_stored_configuration_is_validated_and_files_have_a_bound(copy):
    as_version_0_1(copy)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("batch_size: 4", "batch_size: -4"))
    with pytest.raises(UsageError, match=r"config\.yaml: data\.batch_size"):
        Source(copy)
    (copy / "config.yaml").write_text(text)
    os.truncate(copy / "phases.json", SMALL + 1)
    with pytest.raises(RunError, match="at most"):
        Source(copy)


EXTRA = {"seconds": 0.0, "skipped": 0, "history": []}
RECORDS = {
    "a phase": (lambda p: p.update(phase=9), "names phase 8 of 2"),
    "a step": (lambda p: p.update(phase=0, step=99, finished=False, extra=EXTRA), "phase 0, step 99"),
    "an item": (lambda p: p["versions"].update({"stacks/../..": 1}), "no record in .* is sound"),
    "a stack": (lambda p: p["versions"].update({"stacks/777": 1}), "names the item"),
    "a format": (lambda p: p["formats"].update({"stacks/000": "fp3"}), "no record in .* is sound"),
    "a result": (lambda p: [r.update(index=7) for r in p["results"]], "names phase 7 of 2"),
    "a digest": (lambda p: p["digests"].update({"secret": "0" * 64}), "no file of a run"),
    "a digest above": (lambda p: p["digests"].update({"../secret": "0" * 64}), "no record in .* is sound"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_that_does_not_fit_the_plan_is_refused(case, copy):
    edit, words = RECORDS[case]
    change_records(copy, edit)
    with pytest.raises(RunError, match=words):
        Source(copy)
