"""The activation cache: what is read is bitwise what was put, wherever it lay; what is incomplete is never read."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.config.schema import MeshConfig
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.memory import ActivationCache, Placement, cache_key, make_mesh
from stackwise_jax.memory.read_ahead import read_ahead
from stackwise_jax.memory.spill import SpillFile

B, T, D = 8, 4, 16
N = 6  # chunks


@pytest.fixture
def placement():
    return Placement(make_mesh(MeshConfig()))


@pytest.fixture
def make_cache(placement, tmp_path):
    """Caches of which the first `n_host` chunks lie in host memory and the others on disk."""
    opened = []

    def make(n_host=N, dtype=jnp.float32, depth=2, **changes):
        size = B * T * D * jnp.dtype(dtype).itemsize
        settings = dict(kind="host", host_budget=n_host * size, disk_budget=(N - n_host) * size, read_ahead=depth)
        opened.append(ActivationCache(placement, directory=tmp_path / "cache", **(settings | changes)))
        return opened[-1]

    yield make
    for cache in opened:
        cache.close()


def chunk(i, dtype=jnp.float32):
    values = np.random.default_rng(i).standard_normal((B, T, D)).astype(np.float32)
    values[0, 0, :3] = [np.nan, -0.0, np.inf]
    return values.astype(dtype)


def produce(placement, dtype=jnp.float32):
    return lambda i: placement.put(chunk(i, dtype), placement.batch)


def raw(x):
    return np.asarray(x).tobytes()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("n_host", [N, 2, 0])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_read_is_bitwise_what_was_put(make_cache, placement, n_host, dtype, depth):
    cache = make_cache(n_host, dtype, depth)
    ids = [10 + i for i in range(N)]
    cache.fill("a", ids, produce(placement, dtype))
    assert sorted(cache.ids) == ids and cache.key == "a"
    order = [15, 10, 10, 12, 11, 14, 13, 10, 15]
    with jax.transfer_guard("disallow"):
        for i, h in zip(order, cache.read("a", order), strict=True):
            assert h.sharding == placement.batch and h.dtype == dtype
            assert raw(h) == chunk(i, dtype).tobytes()


def test_kind_disk_uses_no_host_memory(make_cache, placement):
    cache = make_cache(kind="disk", disk_budget=1 << 20)
    cache.fill("a", range(N), produce(placement))
    assert cache.host_bytes == 0 and cache.disk_bytes == N * B * T * D * 4
    assert [raw(h) for h in cache.read("a", range(N))] == [chunk(i).tobytes() for i in range(N)]


@pytest.mark.parametrize("n_host", [N, 3, 0])
def test_budgets_are_respected(make_cache, placement, n_host):
    cache = make_cache(n_host)
    cache.fill("a", range(N), produce(placement))
    size = B * T * D * 4
    assert (cache.host_bytes, cache.disk_bytes, cache.chunk_bytes) == (n_host * size, (N - n_host) * size, size)


def test_budgets_too_small_are_refused_before_the_work(make_cache, placement):
    produced = []
    cache = make_cache(2, disk_budget=B * T * D * 4 * (N - 3))
    with pytest.raises(UsageError, match=r"cache\.host_budget.*cache\.disk_budget"):
        cache.fill("a", range(N), lambda i: produced.append(i) or produce(placement)(i))
    assert produced == [0] and cache.key is None and cache.ids == ()


@pytest.mark.parametrize("n_host", [N, 2, 0])
def test_advance_equals_filling_anew(make_cache, placement, n_host):
    stack = jax.jit(lambda h, i: jnp.sin(h) * i, out_shardings=placement.batch)
    index = [placement.put(np.float32(i), placement.replicated) for i in range(N)]
    advanced, refilled = make_cache(n_host), make_cache(n_host)
    advanced.fill("a", range(N), produce(placement))
    held = advanced.host_bytes, advanced.disk_bytes
    with jax.transfer_guard("disallow"):
        advanced.advance("b", lambda i, h: stack(h, index[i]))
    refilled.fill("b", range(N), lambda i: stack(produce(placement)(i), index[i]))
    assert (advanced.host_bytes, advanced.disk_bytes) == held
    pairs = zip(advanced.read("b", range(N)), refilled.read("b", range(N)), strict=True)
    assert all(raw(x) == raw(y) for x, y in pairs)
    with pytest.raises(RunError):
        advanced.read("a", range(N))


def test_donating_what_was_read_leaves_the_cache_alone(make_cache, placement):
    destroy = jax.jit(lambda h: h * 0, donate_argnums=0, out_shardings=placement.batch)
    cache = make_cache(3)
    cache.fill("a", range(N), produce(placement))
    for h in cache.read("a", [0, N - 1]):
        destroy(h).block_until_ready()
    assert [raw(h) for h in cache.read("a", [0, N - 1])] == [chunk(0).tobytes(), chunk(N - 1).tobytes()]


def test_stale_and_empty_caches_are_refused(make_cache, placement):
    cache = make_cache()
    for use in (lambda: cache.check("a"), lambda: cache.read("a", [0]), lambda: cache.advance("b", lambda i, h: h)):
        with pytest.raises(RunError, match="filled"):
            use()
    cache.fill("a", range(N), produce(placement))
    cache.check("a")
    with pytest.raises(RunError, match="filled again"):
        cache.read("b", [0])
    cache.close()
    with pytest.raises(RunError, match="filled again"):
        cache.read("a", [0])


@pytest.mark.parametrize("change", ["fill", "advance"])
@pytest.mark.parametrize("n_host", [N, 2, 0])
def test_interrupted_changes_leave_nothing_readable(make_cache, placement, n_host, change):
    cache = make_cache(n_host)
    cache.fill("a", range(N), produce(placement))

    def stop_at_3(i, h=None):
        if i == 3:
            raise KeyboardInterrupt
        return produce(placement)(i) if h is None else h

    with pytest.raises(KeyboardInterrupt):
        cache.fill("b", range(N), stop_at_3) if change == "fill" else cache.advance("b", stop_at_3)
    assert cache.key is None and cache.ids == () and cache.host_bytes == cache.disk_bytes == 0
    for key in ("a", "b"):
        with pytest.raises(RunError):
            cache.read(key, [0])
    cache.fill("c", range(N), produce(placement))
    assert raw(next(cache.read("c", [4]))) == chunk(4).tobytes()


def test_a_reader_of_a_changed_cache_is_stopped(make_cache, placement):
    cache = make_cache(2, depth=1)
    cache.fill("a", range(N), produce(placement))
    reader = cache.read("a", [0, 1, 2, 3, 4, 5] * 3)
    next(reader)
    cache.advance("b", lambda i, h: h + 1)
    with pytest.raises(RunError):
        list(reader)


@pytest.mark.parametrize("n_host", [N, 0])
def test_nothing_is_read_while_the_cache_advances(make_cache, placement, n_host):
    cache = make_cache(n_host)
    cache.fill("a", range(N), produce(placement))

    def look(i, h):
        for key in ("a", "b"):
            with pytest.raises(RunError):
                cache.read(key, [i])
        return h

    cache.advance("b", look)
    cache.check("b")


@pytest.mark.parametrize("depth", [0, 1])
def test_a_chunk_that_changes_while_it_is_loaded_is_not_handed_out(make_cache, placement, monkeypatch, depth):
    cache, read = make_cache(0, depth=depth), SpillFile.read
    cache.fill("a", range(N), produce(placement))

    def read_then_close(spill, *args):
        data = read(spill, *args)
        cache.close()
        return data

    reader = cache.read("a", range(N))
    monkeypatch.setattr(SpillFile, "read", read_then_close)
    with pytest.raises(RunError):
        next(reader)


def test_changed_shapes_and_unknown_batches(make_cache, placement):
    cache = make_cache()
    cache.fill("a", range(N), produce(placement))
    with pytest.raises(KeyError, match="99"):
        list(cache.read("a", [0, 99]))
    with pytest.raises(ValueError, match="differs"):
        cache.advance("b", lambda i, h: h.astype(jnp.bfloat16))
    assert cache.key is None


def test_a_chunk_in_another_sharding_is_moved(make_cache, placement):
    cache = make_cache(3)
    cache.fill("a", range(N), lambda i: placement.put(chunk(i), placement.replicated))
    assert [raw(h) for h in cache.read("a", range(N))] == [chunk(i).tobytes() for i in range(N)]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("n_host", [8, 0])
def test_chunks_on_the_device_are_bounded(make_cache, placement, n_host, depth):
    shape = (B, 3, 7)  # no other array of the tests has it
    cache = make_cache(host_budget=1 << 20 if n_host else 0, disk_budget=1 << 20, depth=depth)

    def on_device():
        return sum(x.shape == shape and x.sharding.memory_kind == "device" for x in jax.live_arrays())

    def make(i, h=None):
        assert on_device() <= (0 if h is None else depth + 1)
        return placement.put(np.full(shape, i, np.float32), placement.batch)

    cache.fill("a", range(8), make)
    assert on_device() == 0
    for h in cache.read("a", range(8)):
        time.sleep(0.02)  # the reader gets as far ahead as it may
        assert h.shape == shape and on_device() <= depth + 1
        del h
        assert on_device() <= depth
    cache.advance("b", make)
    assert on_device() == 0


def test_progress_is_told(make_cache, placement):
    cache, told = make_cache(), []
    cache.fill("a", range(N), produce(placement), lambda *done: told.append(done))
    cache.advance("b", lambda i, h: h, lambda *done: told.append(done))
    assert told == [(i, N) for i in range(1, N + 1)] * 2


def test_full_disk(make_cache, placement, monkeypatch, tmp_path):
    cache, writes, pwrite = make_cache(2), [], os.pwrite

    def full_after_two(fd, data, offset):
        writes.append(offset)
        if len(writes) > 2 * len(jax.devices()):
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data[: len(data) // 2 or None], offset)  # the system may write less than asked

    monkeypatch.setattr(os, "pwrite", full_after_two)
    with pytest.raises(RunError, match=rf"{tmp_path}.*full.*cache\.dir"):
        cache.fill("a", range(N), produce(placement))
    assert cache.key is None
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: len(data) // 2 or None], at))
    cache.fill("a", range(N), produce(placement))
    assert [raw(h) for h in cache.read("a", range(N))] == [chunk(i).tobytes() for i in range(N)]


def test_a_cleared_spill_file_takes_no_space(tmp_path):
    spill = SpillFile(tmp_path)
    spill.reserve(8)
    spill.write(0, [np.arange(2, dtype=np.float32)])
    assert spill.read(4, 4).view(np.float32) == 1
    spill.clear()
    with pytest.raises(RunError, match=r"cache\.dir.*ends early"):
        spill.read(0, 8)
    spill.close()


def test_disk_with_too_little_space_is_refused_at_once(make_cache, placement, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 10}))
    with pytest.raises(RunError, match=r"only 10 B free.*cache\.dir"):
        make_cache(2).fill("a", range(N), produce(placement))


def test_unusable_directory(make_cache, placement, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(UsageError, match=r"cache\.dir"):
        make_cache(0).fill("a", range(N), produce(placement))


def test_pinned_memory_runs_out(make_cache, placement):
    def fail(i):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of host memory ... allocator xla_gpu_host_bfc")

    with pytest.raises(RunError, match=r"cache\.host_budget"):
        make_cache().fill("a", range(N), fail)


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_close_removes_the_spill_file(make_cache, placement, tmp_path):
    cache, before = make_cache(0), open_files()
    cache.fill("a", range(N), produce(placement))
    assert open_files() == before + 1
    cache.close()
    assert open_files() == before and list((tmp_path / "cache").iterdir()) == []


KILLED = """
import os, signal, sys
import jax, numpy as np
from stackwise_jax.config.schema import MeshConfig
from stackwise_jax.memory import ActivationCache, Placement, make_mesh
placement = Placement(make_mesh(MeshConfig()))
cache = ActivationCache(placement, kind="disk", host_budget=0, disk_budget=1 << 30, directory=sys.argv[1], read_ahead=1)
cache.fill("a", range(3), lambda i: placement.put(np.ones((8, 4), np.float32), placement.batch))
cache.advance("b", lambda i, h: h if i < 1 else os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_killed_process_leaves_no_file(tmp_path):
    process = subprocess.run([sys.executable, "-c", KILLED, tmp_path], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(jax.device_count() > 1, reason="this is the run with four devices")
def test_all_of_this_on_four_devices():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout


def test_read_ahead_loads_before_it_is_asked_and_ends_its_thread():
    loaded = []
    items = read_ahead(lambda i: loaded.append(i) or i, iter(range(10**9)), 3)
    assert next(items) == 0
    wait_for(lambda: loaded == [0, 1, 2, 3])
    time.sleep(0.02)
    assert loaded == [0, 1, 2, 3]  # three wait, no more
    items.close()
    wait_for(lambda: all(thread.name != "read_ahead" for thread in threading.enumerate()))


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_read_ahead_raises_where_the_item_would_have_come(depth):
    items = read_ahead(lambda i: 1 / (2 - i), [0, 1, 2, 3], depth)
    assert [next(items), next(items)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(items)


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_cache_key():
    key = cache_key(prefix="abc", noise=0.15, seed=1, mesh=MeshConfig(), path=(0, 1))
    assert key == cache_key(seed=1, noise=0.15, path=[0, 1], mesh=MeshConfig(), prefix="abc") and len(key) == 64
    assert key != cache_key(prefix="abc", noise=0.15, seed=2, mesh=MeshConfig(), path=(0, 1))
    assert cache_key(train=frozenset({3, 11, 2})) == cache_key(train={11, 2, 3})
    assert cache_key(seed=np.int32(1)) == cache_key(seed=1)
    with pytest.raises(TypeError, match="ndarray"):
        cache_key(weights=np.ones(2))
