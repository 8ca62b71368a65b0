"""The store and the metrics file as they are meant to be used."""

import json
import logging
import math
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from stackwise_jax.checkpoint import MetricsLog, Progress, Store, readable
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.memory.hashing import tree_hash


def tree_of(seed, width=16, dtype=np.float32):
    random = np.random.default_rng(seed)
    kernel = random.standard_normal((2, width, width)).astype(dtype)
    return {"blocks": {"attn": {"q": {"kernel": kernel}}, "norm": {"scale": np.full((2, width), seed, dtype)}}}


def record(number, versions, **changes):
    return Progress(number=number, phase=0, step=number, global_step=number, versions=versions, **changes)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def files_of(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


class State(NamedTuple):
    count: jax.Array
    moments: tuple
    nothing: None = None


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8])
def test_a_tree_comes_back_bitwise_with_its_dtype(tmp_path, dtype):
    store, tree = Store(tmp_path, keep=1), jax.tree.map(lambda x: x.astype(dtype), tree_of(3))
    store.save_item("stacks/000", 1, jax.device_put(tree), {"phase": 2})
    assert_same(store.load_item("stacks/000", 1), tree)
    assert store.item_meta("stacks/000", 1) == {"phase": 2}
    shapes = store.item_shapes("stacks/000", 1)
    assert shapes["blocks"]["norm"]["scale"] == jax.ShapeDtypeStruct((2, 16), dtype)


def test_optimizer_state_keeps_its_containers_with_like(tmp_path):
    moments = ({"w": jnp.arange(6.0).reshape(2, 3)}, [jnp.ones(3, jnp.bfloat16)] * 12, jnp.zeros((0, 4)), ())
    state, store = State(jnp.int32(7), moments), Store(tmp_path)
    store.save_item("optimizer", 0, state, {})
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    loaded = store.load_item("optimizer", 0, like)
    assert_same(loaded, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    assert store.load_item("optimizer", 0)["count"] == 7


def test_an_empty_tree_can_be_saved(tmp_path):
    store = Store(tmp_path)
    store.save_item("optimizer", 0, {"a": None, "b": ()}, {"kind": "sgd"})
    assert store.load_item("optimizer", 0) == {}
    assert store.load_item("optimizer", 0, like={"a": None, "b": ()}) == {"a": None, "b": ()}


def test_restore_casts_as_xla_does_and_places_on_host_and_on_other_shardings(tmp_path):
    wide = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32) * np.float32(1e3)
    wide[0, :8] = [np.inf, -np.inf, 1e38, 7e4, -7e4, 1e-7, 3e-8, -0.0]
    store = Store(tmp_path)
    store.save_item("head", 1, {"kernel": wide}, {})
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        for sharding in (
            NamedSharding(mesh, PartitionSpec("fsdp")),
            NamedSharding(mesh, PartitionSpec(), memory_kind="pinned_host"),
            SingleDeviceSharding(jax.devices()[0]),
        ):
            target = {"kernel": jax.ShapeDtypeStruct(wide.shape, dtype, sharding=sharding)}
            kernel = store.load_item("head", 1, target)["kernel"]
            assert kernel.sharding == sharding and kernel.committed
            assert_same(kernel, jnp.asarray(wide).astype(dtype))


def test_a_tree_sharded_over_eight_devices_is_saved_and_restored_onto_another_sharding(tmp_path):
    code = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from stackwise_jax.checkpoint import Store
mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"))
values = np.arange(64, dtype=np.float32).reshape(8, 8)
tree = {"w": jax.device_put(values, NamedSharding(mesh, P("fsdp")))}
store = Store(sys.argv[1])
store.save_item("head", 0, tree, {})
for spec, kind in ((P(None, "fsdp"), "device"), (P("data"), "pinned_host"), (P(), "device")):
    sharding = NamedSharding(mesh, spec, memory_kind=kind)
    w = store.load_item("head", 0, {"w": jax.ShapeDtypeStruct((8, 8), "bfloat16", sharding=sharding)})["w"]
    assert w.sharding == sharding and w.dtype == "bfloat16" and (np.asarray(w) == values).all()
assert (store.load_item("head", 0)["w"] == values).all()
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""  # Orbax's own messages are silenced


def test_a_tree_that_does_not_fit_is_refused_with_the_leaf_named(tmp_path):
    store = Store(tmp_path)
    store.save_item("head", 1, tree_of(1), {})
    with pytest.raises(UsageError, match="blocks/attn/q/kernel"):
        store.load_item("head", 1, jax.eval_shape(lambda: tree_of(1, width=8)))
    with pytest.raises(UsageError, match="lacks 'bias'"):
        store.load_item("head", 1, tree_of(1) | {"bias": np.zeros(3)})


def test_one_item_is_read_without_the_others(tmp_path):
    store = Store(tmp_path)
    for index in range(3):
        store.save_item(f"stacks/{index:03d}", 1, tree_of(index), {})
    for path in tmp_path.rglob("*"):
        if path.is_file() and "stacks/001" not in path.as_posix():
            path.write_bytes(b"")
    assert_same(Store(tmp_path).load_item("stacks/001", 1), tree_of(1))


def test_gc_keeps_exactly_what_kept_records_need_and_never_rewrites_it(tmp_path):
    store = Store(tmp_path, keep=2)
    meta = {"phase": 0, "history": [(1, math.nan)]}
    store.save_item("stacks/000", 1, tree_of(1), meta)
    store.save_item("head", 1, tree_of(1), {})
    store.commit(record(1, {"head": 1, "stacks/000": 1}))
    written = files_of(tmp_path / "stacks/000/00000001")
    for number in range(2, 8):
        store.save_item("head", number, tree_of(number), {})
        store.save_item("stacks/000", 1, tree_of(1), meta)  # again the same: nothing is written
        store.commit(record(number, {"head": number, "stacks/000": 1}))
        for kept in store.records():
            for name, version in store.read(kept).versions.items():
                assert_same(store.load_item(name, version), tree_of(version))
    assert store.records() == [6, 7]
    assert store.items() == {"head": [6, 7], "stacks/000": [1]}
    assert files_of(tmp_path / "stacks/000/00000001") == written


def test_a_committed_version_is_never_replaced_and_an_uncommitted_one_is(tmp_path):
    store = Store(tmp_path)
    store.save_item("head", 1, tree_of(1), {})
    store.save_item("head", 1, tree_of(2), {})
    assert_same(store.load_item("head", 1), tree_of(2))
    store.commit(record(1, {"head": 1}))
    for tree, meta in ((tree_of(3), {}), (tree_of(2), {"phase": 1})):
        with pytest.raises(RunError, match="committed"):
            store.save_item("head", 1, tree, meta)
    assert_same(store.load_item("head", 1), tree_of(2))


def test_a_record_holds_all_it_was_given(tmp_path):
    store = Store(tmp_path)
    assert store.latest() is None and store.records() == []
    store.save_item("embed", 4, tree_of(4), {})
    full = Progress(
        number=9,
        phase=2,
        step=17,
        global_step=417,
        versions={"embed": 4},
        formats={"embed": "bf16"},
        data={"position": [1, {"epoch": 3}]},
        metrics_bytes=12345,
        results=[{"name": "stack 0", "bits_per_byte": 2.0625}],
        bad_steps=1,
        finished=True,
        extra={"best": None},
    )
    store.commit(full)
    assert Store(tmp_path).latest() == full


def test_a_record_is_refused_when_an_item_is_missing_or_a_newer_record_exists(tmp_path):
    store = Store(tmp_path)
    store.save_item("head", 5, tree_of(5), {})
    with pytest.raises(RunError, match="stacks/000/00000003 is missing"):
        store.commit(record(5, {"head": 5, "stacks/000": 3}))
    assert store.latest() is None
    store.commit(record(5, {"head": 5}))
    with pytest.raises(RunError, match="not older"):
        store.commit(record(4, {"head": 5}))
    assert store.latest() == record(5, {"head": 5})


def test_names_that_could_leave_the_store_or_be_taken_for_versions_are_refused(tmp_path):
    for name in ("progress", "../x", "/x", "stacks/00000003", "a//b", ".x", "stacks/000.tmp", ""):
        with pytest.raises(ValueError, match="cannot name"):
            Store(tmp_path).save_item(name, 0, {}, {})
    with pytest.raises(UsageError, match=r"run\.keep"):
        Store(tmp_path, keep=0)


def test_readable_tells_runs_stores_and_items_apart(tmp_path):
    store = Store(tmp_path / "run" / "checkpoints")
    store.save_item("stacks/003", 7, tree_of(7), {})
    kinds = {
        tmp_path / "run": ("run", None, None),
        store.directory: ("store", None, None),
        store.directory / "stacks/003": ("item", "stacks/003", None),
        store.path("stacks/003", 7): ("item", "stacks/003", 7),
    }
    for path, expected in kinds.items():
        location = readable(path)
        assert location is not None and location.store == store.directory
        assert (location.kind, location.name, location.version) == expected
    for path in (tmp_path, tmp_path / "none", store.directory / "stacks", store.directory / "progress"):
        assert readable(path) is None


def test_tree_hash_sees_paths_dtypes_shapes_and_bytes_and_nothing_else():
    tree = {"a": np.arange(6, dtype=np.float32), "b": (np.ones(2, ml_dtypes.bfloat16),)}
    base = tree_hash(tree)
    pinned = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    assert tree_hash(jax.device_put(tree, pinned)) == tree_hash(jax.device_put(tree)) == base
    assert tree_hash(dict(reversed(tree.items()))) == base
    others = [
        tree | {"a": tree["a"].reshape(2, 3)},
        tree | {"a": tree["a"].view(np.int32)},
        tree | {"a": tree["a"] + np.float32(1e-6)},
        {"c": tree["a"], "b": tree["b"]},
        {"a": tree["a"]},
    ]
    assert len({base, *map(tree_hash, others)}) == len(others) + 1
    with pytest.raises(ValueError, match="same path"):
        tree_hash({"a/b": 1, "a": {"b": 2}})


def test_metrics_are_cut_back_to_where_the_run_goes_on_from(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    metrics = MetricsLog(path)
    metrics.append({"step": np.int64(1), "loss": jnp.float32(0.5), "name": "stack 0"})
    metrics.sync()
    length = metrics.tell()
    metrics.append({"step": 2, "loss": math.nan})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5, "name": "stack 0"},
        {"step": 2, "loss": None},
    ]
    metrics.close()
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo')  # a kill in the middle of a line
    again = MetricsLog(path)
    again.truncate(length)
    again.append({"step": 2, "loss": 0.25})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_metrics_that_someone_cut_keep_their_whole_lines(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    with caplog.at_level(logging.WARNING):
        metrics = MetricsLog(path)
        metrics.truncate(500)
    assert "metrics.jsonl" in caplog.text
    metrics.append({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'
