"""Stores that somebody else made or changed: checked before anything is read, and nothing outside them is touched."""

import contextlib
import json
import os
import shutil

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from stackwise_jax.checkpoint import MetricsLog, Progress, Store, items
from stackwise_jax.checkpoint.database import INDEX, check_index
from stackwise_jax.checkpoint.files import read_json, write_json
from stackwise_jax.errors import RunError

BIG = 10**11


def tree_of(seed):
    noise = np.random.default_rng(seed)
    return {"q": {"kernel": noise.standard_normal((2, 16, 16)).astype(np.float32)}, "n": np.int32(seed)}


def record(number, versions, **changes):
    return Progress(number=number, phase=0, step=number, global_step=number, versions=versions, **changes)


def store_at(directory):
    store = Store(directory)
    store.save_item("stacks/000", 1, tree_of(1), {"phase": 0})
    store.commit(record(1, {"stacks/000": 1}))
    store.close()
    return store


def forge(file, change):
    """Change a JSON file and give it a fitting checksum."""
    data = read_json(file)
    change(data)
    write_json(file, data)


def list_again(item):
    """Have meta.json list the files that are there, with their checksums: what somebody who forges an item does."""
    files = {p.relative_to(item).as_posix(): p for p in item.rglob("*") if p.is_file() and p.name != items.META}
    digests = {name: items._file_digest(path) for name, path in files.items()}
    forge(item / items.META, lambda data: data.update(files=digests))


def save_as_orbax_does(item, tree, **how):
    """Replace the arrays of an item by what Orbax writes by default: a database, compressed."""
    shutil.rmtree(item / "arrays")
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**how)).save(item / "arrays", args=ocp.args.PyTreeSave(tree))
    list_again(item)


# Files of an item.


def test_the_remedy_for_a_stray_file_removes_no_record(tmp_path):
    store = store_at(tmp_path)
    store.save_item("stacks/000", 2, tree_of(2), {})
    store.commit(record(2, {"stacks/000": 2}))
    (store.path("stacks/000", 2) / "x").touch()
    with pytest.raises(RunError, match=r"does not list it\); remove that file$"):
        store.load_item("stacks/000", 2)


def test_a_leaf_cannot_lie_within_another(tmp_path):
    store = store_at(tmp_path)
    table = store.path("stacks/000", 1) / items.META
    forge(table, lambda data: data["leaves"].update({"n/x": data["leaves"]["n"]}))
    with pytest.raises(RunError, match=r"meta\.json is damaged: the name of a leaf cannot be 'n/x'"):
        store.item_shapes("stacks/000", 1)


def test_a_file_that_is_not_listed_is_refused_and_weights_stay(tmp_path):
    store = store_at(tmp_path)
    item = store.path("stacks/000", 1)
    (item / "arrays" / "checkpoint").write_bytes(b"\x80")  # where Orbax finds this, it reads nothing else
    with pytest.raises(RunError, match=r"arrays/checkpoint is not part of the checkpoint .* remove that file"):
        store.load_item("stacks/000", 1)
    (item / "arrays" / "checkpoint").unlink()
    assert store.load_item("stacks/000", 1)["n"] == 1


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../../x", "arrays/../../x", "arrays\\x", "a\0b", "", "./meta.json"]
)
def test_a_listed_name_that_leaves_the_item_is_refused(tmp_path, name):
    store = store_at(tmp_path)
    forge(store.path("stacks/000", 1) / items.META, lambda data: data["files"].update({name: "0" * 64}))
    for read in (store.load_item, store.item_meta, store.item_shapes):
        with pytest.raises(RunError, match="the name of a file cannot be"):
            read("stacks/000", 1)


def test_links_and_pipes_in_an_item_are_refused(tmp_path):
    store = store_at(tmp_path / "run")
    item = store.path("stacks/000", 1)
    chunk, elsewhere = item / "arrays" / "n" / "0", tmp_path / "elsewhere"
    for path in (chunk, chunk.parent, item / "arrays", item / items.META, item, item.parent, item.parent.parent):
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        with pytest.raises(RunError, match="symbolic link"):
            store.load_item("stacks/000", 1)
        path.unlink()
        elsewhere.rename(path)
    chunk.unlink()
    os.mkfifo(chunk)
    with pytest.raises(RunError, match="neither a file nor a directory"):
        store.load_item("stacks/000", 1)


# What an item declares.


def test_items_of_version_0_1_load(tmp_path):
    store = store_at(tmp_path / "plain")
    tree = {"q": {"kernel": np.arange(512, dtype=np.float32).reshape(2, 16, 16)}, "n": np.asarray(7, np.int32)}
    save_as_orbax_does(store.path("stacks/000", 1), tree, use_compression=False)
    assert (store.path("stacks/000", 1) / "arrays" / "manifest.ocdbt").exists()
    store.directory.rename(tmp_path / "a[1]*?\\b")
    shutil.copytree(tmp_path / "a[1]*?\\b", tmp_path / "plain")
    for directory in ("plain", "a[1]*?\\b", "plain/../plain", "plain/../a[1]*?\\b"):
        loaded = Store(tmp_path / directory).load_item("stacks/000", 1)
        assert loaded["n"] == 7 and np.array_equal(loaded["q"]["kernel"], tree["q"]["kernel"])


@pytest.mark.parametrize("database", [True, False])
def test_compressed_arrays_are_refused_before_they_are_read(tmp_path, database):
    store = store_at(tmp_path)
    bomb = {"q": {"kernel": np.zeros((2, 1024, 1024), np.float32)}, "n": np.asarray(1, np.int32)}
    item = store.path("stacks/000", 1)
    save_as_orbax_does(item, bomb, use_ocdbt=database, use_compression=True)
    assert sum(path.stat().st_size for path in item.rglob("*") if path.is_file()) < 10**5
    forge(item / items.META, lambda data: data["leaves"]["q/kernel"].update(shape=[2, 1024, 1024]))
    with pytest.raises(RunError, match=r"its leaves have 8,388,612 bytes|compressor is .*zstd.* has to be None"):
        store.load_item("stacks/000", 1)
    forge(item / items.META, lambda data: data["leaves"]["q/kernel"].update(shape=[2, 16, 16]))
    with pytest.raises(RunError, match=r"shape is \[2, 1024, 1024\] and has to be|compressor is"):
        store.load_item("stacks/000", 1)


def test_a_database_whose_index_is_a_bomb_is_refused_before_it_is_opened(tmp_path):
    """Its leaf is small and sound; beside it the index holds zeros, which TensorStore would decompress on the way."""
    store = store_at(tmp_path)
    item = store.path("stacks/000", 1)
    shutil.rmtree(item / "arrays")
    forge(item / items.META, lambda data: data.update(leaves={"n": {"shape": [], "dtype": "int32"}}))
    where = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item / 'arrays'}/"}}
    config = {"max_inline_value_bytes": 2**20, "max_decoded_node_bytes": 2**30}
    database = ts.KvStore.open({**where, "config": config}).result()
    described = {"zarr_format": 2, "shape": [], "chunks": [], "dtype": "<i4", "order": "C", "fill_value": None}
    with ts.Transaction() as change:
        leaf = database.with_transaction(change)
        leaf["n/.zarray"] = json.dumps({**described, "filters": None, "compressor": None}).encode()
        leaf["n/0"] = b"\7\0\0\0"
    list_again(item)
    assert store.load_item("stacks/000", 1)["n"] == 7
    with ts.Transaction() as change:
        for number in range(INDEX // 2**20 + 1):
            database.with_transaction(change)[f"o{number:04d}"] = bytes(2**20)
    list_again(item)
    assert sum(path.stat().st_size for path in item.rglob("*") if path.is_file()) < 10**5
    with pytest.raises(RunError, match="the index of its item may have more than 67,108,864 bytes, uncompressed"):
        store.load_item("stacks/000", 1)


def node(content, magic=b"\x0c\xdb\x20\xde", how=b"\0\1"):
    return magic + (len(content) + 18).to_bytes(8, "little") + how + content + b"crc4"


def frame(blocks, head=b"\x20\x07", last=1, size=2**17):
    """A frame of zstd whose blocks are one byte, repeated."""
    kinds = [last if n == blocks - 1 else 0 for n in range(blocks)]
    return b"\x28\xb5\x2f\xfd" + head + b"".join((kind | 2 | size << 3).to_bytes(3, "little") + b"x" for kind in kinds)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (node(frame(512)), None),
        (node(frame(5, head=b"\x00\x58")) + node(frame(1, head=b"\x60\1\2"), magic=b"\x0c\xdb\x12\x34"), None),
        (node(frame(1, head=b"\x24\x07") + b"sums"), None),
        (node(frame(600), how=b"\0\0"), None),
        (node(frame(513))[:-1], None),  # TensorStore takes no node that ends early
        (b"values" + node(frame(513)), "more than"),
        (node(frame(256)) + b"." + node(frame(257), magic=b"\x0c\xdb\x3a\x2a"), "more than"),
        (node(frame(1) + frame(10**4)), "not as version 0.1"),
        (node(frame(3, last=0)), "not as version 0.1"),
        (node(frame(1, size=2**18)), "not as version 0.1"),
        (node(frame(10**4), how=b"\x80\0\x81\0"), "not as version 0.1"),
        (node(b"\x50\x2a\x4d\x18\0\0\0\0" + frame(10**4)), "not as version 0.1"),
        (node(b""), "not as version 0.1"),
    ],
)
def test_the_index_of_a_database_is_bounded_by_its_blocks(tmp_path, content, reason):
    (tmp_path / "file").write_bytes(content)
    with contextlib.nullcontext() if reason is None else pytest.raises(RunError, match=reason):
        check_index(tmp_path, {"file": len(content)})


LEAF = "q/kernel"
DECLARED = {
    "a giant": {LEAF: {"shape": [BIG, BIG], "dtype": "float32"}},
    "no bytes": {LEAF: {"shape": [BIG, BIG, BIG, 0], "dtype": "float32"}},
    "larger than its file": {LEAF: {"shape": [2, 16, 1600], "dtype": "float32"}},
    "negative": {LEAF: {"shape": [2, -16, 16], "dtype": "float32"}},
    "a fraction": {LEAF: {"shape": [2, 16.0, 16], "dtype": "float32"}},
    "a truth": {LEAF: {"shape": [True, 16, 16], "dtype": "float32"}},
    "a text": {LEAF: {"shape": "2", "dtype": "float32"}},
    "too many dimensions": {LEAF: {"shape": [1] * 1000, "dtype": "float32"}},
    "an unknown dtype": {LEAF: {"shape": [2, 16, 16], "dtype": "float33"}},
    "objects": {LEAF: {"shape": [2, 16, 16], "dtype": "O"}},
    "a dtype that is a list": {LEAF: {"shape": [2, 16, 16], "dtype": ["float32"]}},
    "another dtype": {LEAF: {"shape": [2, 16, 16], "dtype": "int32"}},
    "no dtype": {LEAF: {"shape": [2, 16, 16]}},
    "no table": {LEAF: 7},
    "a leaf elsewhere": {"../../x": {"shape": [2], "dtype": "float32"}},
    "a leaf that is not there": {"other": {"shape": [2], "dtype": "float32"}},
}


@pytest.mark.parametrize("entry", DECLARED.values(), ids=DECLARED.keys())
def test_leaves_that_cannot_be_are_refused(tmp_path, entry):
    store = store_at(tmp_path)
    forge(store.path("stacks/000", 1) / items.META, lambda data: data["leaves"].update(entry))
    with pytest.raises(RunError, match=r"damaged|cannot be read"):
        store.load_item("stacks/000", 1)


ZARRAY = {
    "chunks": [[2, 16, 10**9], [0, 16, 16], [2, 16], [-2, 16, 16], None, [2, 16, 16.0], [1, 1, 1]],
    "shape": [[2, 16, 10**9], [2, 16], "x"],
    "dtype": ["<f8", "|O", [["a", "<f4"]]],
    "compressor": [{"id": "zlib", "level": 9}],
    "filters": [[{"id": "delta"}]],
    "order": ["F"],
    "zarr_format": [3, None],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ZARRAY.items() for value in values])
def test_arrays_that_are_not_what_the_table_says_are_refused(tmp_path, key, value):
    store = store_at(tmp_path)
    item = store.path("stacks/000", 1)
    file = item / "arrays" / "q.kernel" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    list_again(item)
    with pytest.raises(RunError, match="damaged"):
        store.load_item("stacks/000", 1)


@pytest.mark.parametrize("content", [b"[" * 10**5, b"\xff\xfe", b"7", b" " * 2**20, b'{"shape": ' + b"9" * 6000 + b"}"])
def test_descriptions_that_are_no_json_of_ours_are_refused(tmp_path, content):
    store = store_at(tmp_path)
    item = store.path("stacks/000", 1)
    (item / "arrays" / "q.kernel" / ".zarray").write_bytes(content)
    list_again(item)
    with pytest.raises(RunError, match=r"damaged|cannot be read"):
        store.load_item("stacks/000", 1)
    for file in (item / items.META, store.directory / "progress" / "00000001.json"):
        file.write_bytes(content)
    with pytest.raises(RunError, match="damaged"):
        store.item_meta("stacks/000", 1)
    with pytest.raises(RunError, match="damaged"):
        store.read(1)


META = {
    "meta": [None, 7, [], "x"],
    "leaves": [None, 7, [["q", 1]]],
    "files": [None, 7, {"arrays/n/0": 7}, {"arrays/n/0": "abc"}],
}
IN_META = {
    "format": [7, "fp33", []],
    "values": [-1, 1.5, "9", 10**30],
    "loss_history": [7, [1], [["a", 1]]],
    "names": [7],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in META.items() for v in values])
def test_a_table_with_wrong_types_is_refused_and_the_field_named(tmp_path, key, value):
    store = store_at(tmp_path)
    forge(store.path("stacks/000", 1) / items.META, lambda data: data.update({key: value}))
    with pytest.raises(RunError, match=rf"meta\.json is damaged: {key} cannot be"):
        store.item_meta("stacks/000", 1)


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in IN_META.items() for v in values])
def test_facts_with_wrong_types_are_refused_and_named(tmp_path, key, value):
    store = store_at(tmp_path)
    forge(store.path("stacks/000", 1) / items.META, lambda data: data["meta"].update({key: value}))
    with pytest.raises(RunError, match=rf"meta\.{key} cannot be"):
        store.item_meta("stacks/000", 1)


# Links in a store and beside it.


def content(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


PLACES = (
    "",
    "progress",
    "stacks",
    "stacks/000",
    "stacks/000/00000001",
    "stacks/000/00000009",
    "stacks/000/00000002.tmp",
)
FILES = (".lock", "progress/00000001.json", "progress/00000002.json.tmp")


@pytest.mark.parametrize("place", [*PLACES, *FILES])
def test_a_link_in_a_store_is_refused_and_what_it_points_to_stays(tmp_path, place):
    store_at(tmp_path / "run" / "checkpoints")
    path, elsewhere = tmp_path / "run" / "checkpoints" / place, tmp_path / "elsewhere"
    if not path.exists():
        store_at(elsewhere) if place in PLACES else elsewhere.write_text("outside")
    else:
        path.rename(elsewhere)
    path.symlink_to(elsewhere)
    outside = tmp_path / "elsewhere" if place in PLACES else tmp_path
    before = {p: c for p, c in content(outside).items() if "run" not in p.relative_to(tmp_path).parts}
    store = Store(tmp_path / "run" / "checkpoints", keep=1)
    with pytest.raises(RunError, match="symbolic link"):
        store.save_item("stacks/000", 2, tree_of(2), {})
    store = Store(tmp_path / "run" / "checkpoints", keep=1)
    with pytest.raises(RunError, match="symbolic link"):
        store.lock()
    if place in (*PLACES, "progress/00000001.json"):
        with pytest.raises(RunError, match=r"symbolic link|no record"):
            store.items()
            store.hold()
    assert {p: c for p, c in content(outside).items() if "run" not in p.relative_to(tmp_path).parts} == before


def test_the_run_itself_may_be_reached_through_a_link(tmp_path):
    store_at(tmp_path / "scratch" / "checkpoints")
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    store = Store(tmp_path / "run" / "checkpoints")
    store.save_item("stacks/000", 2, tree_of(2), {})
    store.commit(record(2, {"stacks/000": 2}))
    assert store.load_item("stacks/000", 2)["n"] == 2


def test_metrics_are_not_written_through_a_link_or_into_a_pipe(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("outside")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "metrics.jsonl"
    path.symlink_to(outside)
    with pytest.raises(RunError, match=r"metrics\.jsonl is a symbolic link"):
        MetricsLog(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RunError, match="cannot write"):
        MetricsLog(path)
    assert outside.read_text() == "outside"


def test_small_floats_come_back_from_chunks_of_another_size(tmp_path):
    """An array whose devices held parts of it, the last one less than the others."""
    store = store_at(tmp_path)
    item, values = store.path("stacks/000", 1), np.arange(10 * 6).reshape(10, 6).astype(ml_dtypes.bfloat16)
    store.save_item("stacks/000", 2, {"q": values}, {})
    item = store.path("stacks/000", 2)
    described = json.loads((item / "arrays/q/.zarray").read_text()) | {"chunks": [4, 6]}
    (item / "arrays/q/.zarray").write_text(json.dumps(described))
    padded = np.concatenate([values, np.zeros((2, 6), values.dtype)])
    (item / "arrays/q/0.0").write_bytes(padded[:4].tobytes())
    (item / "arrays/q/1.0").write_bytes(padded[4:8].tobytes())
    (item / "arrays/q/2.0").write_bytes(padded[8:].tobytes())
    list_again(item)
    loaded = store.load_item("stacks/000", 2)["q"]
    assert loaded.dtype == values.dtype and loaded.tobytes() == values.tobytes()
