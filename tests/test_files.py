"""Small files: bounded reads that never wait, writes that are whole or nothing and follow no link."""

from __future__ import annotations

import os

import pytest

from stackwise_jax.files import read_regular, write_atomically


def test_what_was_written_is_read(tmp_path):
    write_atomically(tmp_path / "a", "grün\n")
    assert read_regular(tmp_path / "a") == "grün\n".encode()
    write_atomically(tmp_path / "a", b"\x00")
    assert read_regular(tmp_path / "a") == b"\x00"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_regular(tmp_path / "pipe")


def test_a_folder_and_a_large_file_are_refused(tmp_path):
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    (tmp_path / "large").write_bytes(b"12345")
    with pytest.raises(OSError, match="has 5 bytes; at most 4"):
        read_regular(tmp_path / "large", limit=4)
    assert read_regular(tmp_path / "large", limit=5) == b"12345"
    assert read_regular(tmp_path / "large", limit=None) == b"12345"


def test_a_link_is_followed_only_where_that_is_wanted(tmp_path):
    (tmp_path / "there").write_text("secret")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert read_regular(tmp_path / "link") == b"secret"
    with pytest.raises(OSError, match="symbolic link"):
        read_regular(tmp_path / "link", follow=False)


@pytest.mark.parametrize("name", ["a", "a.tmp"])
def test_a_write_replaces_a_link_and_spares_what_it_names(tmp_path, name):
    (tmp_path / "there").write_text("precious")
    (tmp_path / name).symlink_to(tmp_path / "there")
    write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "there").read_text() == "precious"
    assert (tmp_path / "a").read_text() == "new" and not (tmp_path / "a").is_symlink()


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
