"""The folders of a store: which ones are items, and that their names reach the disk."""

import os

import pytest
from test_checkpoint_trust import record, store_at, tree_of


@pytest.mark.parametrize("name", ["foo bar/00000001", "progress/00000001", "00000001"])
def test_folders_that_can_be_no_items_are_left_alone(tmp_path, name):
    store = store_at(tmp_path)
    (store.directory / name).mkdir(parents=True)
    assert store.items() == {"stacks/000": [1]}
    store.save_item("stacks/000", 2, tree_of(2), {})
    store.commit(record(2, {"stacks/000": 2}))
    store.commit(record(3, {"stacks/000": 2}))
    assert (store.directory / name).is_dir() and store.items() == {"stacks/000": [2]}


def test_new_folders_are_forced_to_the_disk(tmp_path, monkeypatch):
    synced = set()
    plain = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.add(os.readlink(f"/proc/self/fd/{fd}")) or plain(fd))
    store = store_at(tmp_path / "run" / "checkpoints")
    for folder in (
        tmp_path,
        tmp_path / "run",
        store.directory,
        store.directory / "stacks",
        store.directory / "progress",
    ):
        assert str(folder) in synced
