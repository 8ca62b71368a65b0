"""Places and processes that cannot be are refused before anything is made."""

from __future__ import annotations

import jax
import pytest
from tiny import tiny

from stackwise_jax.engine import prepare
from stackwise_jax.engine.directory import open_store
from stackwise_jax.errors import RunError, UsageError

PLAN = ["curriculum.plan=append", "model.architecture.n_stacks=2"]


@pytest.mark.parametrize("place", ["file/run", "file/a/b/run", "link/run"])
def test_a_directory_below_something_else_is_refused_before_anything_is_made(place, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("absent")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"run.dir .* is no folder"):
        open_store(prepare(tiny(*PLAN), tmp_path / place))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["auto", "host", "disk", "recompute"])
def test_a_folder_of_the_cache_that_cannot_be_is_refused_before_the_run_is_begun(kind, tmp_path):
    (tmp_path / "file").touch()
    setup = prepare(tiny(*PLAN, f"cache.kind={kind}", f"cache.dir={tmp_path / 'file'}"), tmp_path / "run")
    if kind == "recompute":  # which opens no file there
        open_store(setup).close()
        return
    with pytest.raises(UsageError, match=r"cache.dir: .* name a writable folder"):
        open_store(setup)
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_find_each_other_are_told_in_one_sentence(tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\nMore of it.")

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    group = ["mesh.num_processes=2", "mesh.process_id=1", "mesh.coordinator=localhost:1234"]
    with pytest.raises(RunError, match=r"process 1 of 2 cannot join .*:1234 \(DEADLINE.*timed out\);"):
        prepare(tiny(*group), tmp_path / "run")
