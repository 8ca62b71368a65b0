"""Trees at rest, and what brings them to the device."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from stackwise_jax.config.schema import MeshConfig
from stackwise_jax.errors import RunError
from stackwise_jax.memory import Conveyor, Placement, Scratch, make_mesh, rest
from stackwise_jax.memory.offload import is_mapped

PLACES = ("device", "host", "disk")


def tree() -> dict:
    key = jax.random.key(0)
    return {
        "kernel": jax.random.normal(key, (3, 5, 7)),
        "scale": jnp.arange(5, dtype=jnp.bfloat16),
        "codes": jnp.arange(11, dtype=jnp.uint8),
        "fp8": jnp.arange(6, dtype=ml_dtypes.float8_e4m3fn),
        "nothing": jnp.zeros((0, 4)),
        "count": jnp.int32(3),
    }


@pytest.fixture
def placement() -> Placement:
    return Placement(make_mesh(MeshConfig(data=1), jax.devices()[:1]))


def same(a, b) -> bool:
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_numpy_arrays_in_memory_do_not_rest_on_disk_yet(placement, tmp_path):
    plain = {"a": np.arange(5.0)}
    resting = rest(placement, plain, "disk", Scratch(tmp_path))
    assert is_mapped(resting["a"]) and not is_mapped(plain["a"]) and same(resting, plain)
    assert rest(placement, resting, "disk", Scratch(tmp_path)) is resting


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("before", PLACES)
def test_a_tree_rests_anywhere_and_comes_back_as_it_was(before, place, placement, tmp_path):
    scratch, whole = Scratch(tmp_path), tree()
    resting = rest(placement, rest(placement, whole, before, scratch), place, scratch)
    for leaf in jax.tree.leaves(resting):
        if place == "disk":
            assert isinstance(leaf, np.ndarray)
        else:
            assert leaf.sharding.memory_kind == ("pinned_host" if place == "host" else "device")
    back = placement.put(resting, placement.params(resting))
    assert same(back, whole)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(back)} == {"device"}


def test_what_rests_on_disk_is_overwritten_in_its_place_and_leaves_no_file(placement, tmp_path):
    scratch, first = Scratch(tmp_path / "scratch"), tree()
    resting = rest(placement, first, "disk", scratch)
    brought = placement.put(resting, placement.params(resting))
    second = jax.tree.map(lambda x: x + 1, first)
    again = rest(placement, second, "disk", scratch, into=resting)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(resting), strict=True))
    assert same(again, second)
    assert same(brought, first)  # what was brought to the device before is a copy
    assert list((tmp_path / "scratch").iterdir()) == []


def test_the_space_of_a_tree_is_free_when_its_views_are_gone(tmp_path):
    maps = lambda: sum(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not list what is mapped")
    views = Scratch(tmp_path).store({"a": np.zeros(1 << 16)})
    assert maps() == 1
    del views
    assert maps() == 0


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(RunError, match=r"disk of .* is full.*memory\.offload_to host"):
        Scratch(tmp_path).store({"a": np.zeros(10)})


def test_the_conveyor_holds_one_more_than_is_in_use():
    begun, used, limit = [], [], threading.Lock()

    class Result:
        waited = False

        def block_until_ready(self):
            self.waited = True

    results = [Result() for _ in range(5)]

    def load(i: int) -> int:
        with limit:
            begun.append(i)
        assert i <= len(used) + 1, "a third thing was begun"
        return 10 * i

    belt = Conveyor(load, range(5), ThreadPoolExecutor(1))
    for i in range(5):
        assert belt.take() == 10 * i
        belt.advance(results[i - 1] if i else None)
        assert not i or results[i - 1].waited
        used.append(i)
    assert begun == [0, 1, 2, 3, 4]


def test_the_conveyor_raises_what_loading_raised():
    def load(i: int) -> int:
        raise RunError(f"stack {i} is damaged")

    with pytest.raises(RunError, match="stack 7 is damaged"):
        Conveyor(load, [7], ThreadPoolExecutor(1)).take()
