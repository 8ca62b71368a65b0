"""What the store does when files are damaged, the disk is full, or the process dies."""

import contextlib
import logging
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from stackwise_jax.checkpoint import MetricsLog, Progress, Store
from stackwise_jax.errors import RunError


def tree_of(seed, width=16):
    noise = np.random.default_rng(seed)
    return {"q": {"kernel": noise.standard_normal((2, width, width)).astype(np.float32)}, "scale": np.full(3, seed)}


def record(number, versions):
    return Progress(number=number, phase=0, step=number, global_step=number, versions=versions)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), a, b))


def store_with_two_records(directory):
    store = Store(directory, keep=2)
    for number in (1, 2):
        store.save_item("head", number, tree_of(number), {"phase": 0})
        store.save_item("embed", 1, tree_of(9), {})
        store.commit(record(number, {"head": number, "embed": 1}))
    return store


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "flipped in the middle": lambda path: flip(path, path.stat().st_size // 2),
    "flipped near the end": lambda path: flip(path, -5),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_to_any_file_of_an_item_is_an_error_that_names_it(tmp_path, damage):
    store = store_with_two_records(tmp_path / "sound")
    files = [path.relative_to(store.directory) for path in store.path("head", 2).rglob("*") if path.is_file()]
    assert len(files) >= 4  # meta.json and those of the arrays
    for index, file in enumerate(file for file in files if store.directory.joinpath(file).stat().st_size):
        broken = Store(shutil.copytree(store.directory, tmp_path / f"broken{index}"))
        damage(broken.directory / file)
        with pytest.raises(RunError) as caught:
            broken.load_item("head", 2)
        assert str(broken.directory / file) in str(caught.value)
        assert f"remove {broken.directory / 'progress' / '00000002.json'} to go on from record 1" in str(caught.value)
        assert same(broken.load_item("embed", 1), tree_of(9))


def test_following_the_advice_of_the_error_goes_on_from_the_record_before(tmp_path):
    store = store_with_two_records(tmp_path)
    shutil.rmtree(store.path("head", 2))
    with pytest.raises(RunError, match=r"head/00000002 is missing; .* remove .*00000002\.json"):
        store.load_item("head", 2)
    (tmp_path / "progress" / "00000002.json").unlink()
    progress = store.latest()
    assert progress == record(1, {"head": 1, "embed": 1})
    assert same(store.load_item("head", 1), tree_of(1))


def test_an_item_that_every_record_needs_leaves_only_a_copy_or_a_new_run(tmp_path):
    store = store_with_two_records(tmp_path)
    (store.path("embed", 1) / "meta.json").unlink()
    with pytest.raises(RunError, match=r"embed/00000001/meta\.json is missing; .* start again in another run\.dir"):
        store.load_item("embed", 1)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_newest_record_falls_back_to_the_one_before_and_says_so(tmp_path, caplog, damage):
    store = store_with_two_records(tmp_path)
    damage(tmp_path / "progress" / "00000002.json")
    with caplog.at_level(logging.WARNING):
        progress = store.latest()
    assert progress == record(1, {"head": 1, "embed": 1})
    assert same(store.load_item("head", 1), tree_of(1))
    assert ("00000002.json" in caplog.text) == (2 in store.records())
    store.save_item("head", 2, tree_of(22), {})  # the run goes on and makes record 2 anew
    store.commit(record(2, {"head": 2, "embed": 1}))
    assert store.latest() == record(2, {"head": 2, "embed": 1})
    assert same(store.load_item("head", 2), tree_of(22))


def test_records_that_are_all_damaged_are_not_taken_for_a_new_run(tmp_path):
    store = store_with_two_records(tmp_path)
    for path in (tmp_path / "progress").iterdir():
        flip(path, 60)
    with pytest.raises(RunError, match=r"no record in .*progress is sound"):
        store.latest()


@contextlib.contextmanager
def limited_file_size(n_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(directory, n_bytes):
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", directory]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def assert_survives_a_full_disk(store, limit):
    big = {"w": np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)}
    with limit(), pytest.raises(RunError, match=f"cannot write {store.path('head', 3)}: the disk is full"):
        store.save_item("head", 3, big, {})
    assert store.items() == {"embed": [1], "head": [1, 2]} and not list(store.directory.rglob("*.tmp"))
    with limit(), pytest.raises(RunError, match=r"00000003\.json: the disk is full"):
        padded = Progress(3, 0, 3, 3, {"head": 2, "embed": 1}, extra={"x": "y" * 2**20})
        store.commit(padded)
    assert store.latest() == record(2, {"head": 2, "embed": 1})
    assert same(store.load_item("head", 2), tree_of(2)) and same(store.load_item("embed", 1), tree_of(9))
    store.save_item("head", 3, tree_of(3), {})
    store.commit(record(3, {"head": 3, "embed": 1}))
    assert same(store.load_item("head", 3), tree_of(3))
    assert not list(store.directory.rglob("*.tmp"))


def test_a_file_size_limit_loses_nothing(tmp_path):
    assert_survives_a_full_disk(store_with_two_records(tmp_path), lambda: limited_file_size(100_000))
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    with limited_file_size(100), pytest.raises(RunError, match=r"metrics\.jsonl: the disk is full"):
        for step in range(100):
            metrics.append({"step": step})


def test_a_full_disk_loses_nothing(tmp_path):
    with small_disk(tmp_path / "disk", 900_000):
        store = store_with_two_records(tmp_path / "disk" / "run")
        assert_survives_a_full_disk(store, contextlib.nullcontext)
        store.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_write_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="cannot write"):
        Store(tmp_path / "run").save_item("head", 0, tree_of(0), {})


# A run that saves as fast as it can, each item a function of its version, and goes on from where it stands.
WRITER = """
import sys
import numpy as np
from stackwise_jax.checkpoint import Progress, Store
sys.path.insert(0, sys.argv[2])
from test_checkpoint_failures import tree_of
store = Store(sys.argv[1], keep=2)
progress = store.latest()
number = progress.number if progress else 0
slow = progress.versions["slow"] if progress else 0
while True:
    number += 1
    store.save_item("stacks/000", number, tree_of(number, width=128), {"number": number})
    if number % 5 == 1:
        slow = number
        store.save_item("slow", slow, tree_of(slow), {"number": slow})
    versions = {"stacks/000": number, "slow": slow}
    store.commit(Progress(number, 0, number, number, versions))
    print(number, flush=True)
"""


def kill_and_reopen(directory, kills, seed):
    """Kill a writer again and again; after each kill every kept record must load. Returns how many left garbage."""
    delays, reached, torn = random.Random(seed), 0, 0
    for _ in range(kills):
        command = [sys.executable, "-c", WRITER, str(directory), os.path.dirname(__file__)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        assert writer.stdout is not None
        committed = int(writer.stdout.readline())
        time.sleep(delays.uniform(0, 0.2))
        writer.send_signal(signal.SIGKILL)
        committed = max([committed, *(int(line) for line in writer.stdout.read().split())])
        writer.wait()

        store = Store(directory, keep=2)
        newest = store.latest()
        assert newest is not None and newest.number in (committed, committed + 1) and committed > reached
        reached = newest.number
        torn += bool(list(directory.rglob("*.tmp"))) or store.items()["stacks/000"][-1] > newest.number
        for number in store.records():
            for name, version in store.read(number).versions.items():
                assert store.item_meta(name, version) == {"number": version}
                width = 128 if name == "stacks/000" else 16
                assert same(store.load_item(name, version), tree_of(version, width))
        store.close()
    return torn


def test_sigkill_during_saves_leaves_the_last_committed_state(tmp_path):
    kill_and_reopen(tmp_path / "run", kills=2, seed=0)
    store = Store(tmp_path / "run", keep=1)
    newest = store.latest()
    assert newest is not None
    store.commit(record(newest.number + 1, newest.versions))
    assert store.items() == {name: [version] for name, version in newest.versions.items()}
    assert not list(store.directory.rglob("*.tmp"))


@pytest.mark.slow
def test_sigkill_many_times_during_saves(tmp_path):
    assert kill_and_reopen(tmp_path / "run", kills=12, seed=1) >= 3  # most kills fall inside a save


def test_two_runs_cannot_write_the_same_directory(tmp_path):
    directory = tmp_path / "run"
    command = [sys.executable, "-c", WRITER, str(directory), os.path.dirname(__file__)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(RunError, match="another run is writing"):
            Store(directory).save_item("head", 0, tree_of(0), {})
        assert Store(directory).latest() is not None
    finally:
        writer.kill()
        writer.wait()
    Store(directory).save_item("head", 0, tree_of(0), {})


# One of two processes: a leaf that is spread over both, one that is replicated, and a disk that is full for process 0.
TOGETHER = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
directory, address, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(address, num_processes=2, process_id=index)
from stackwise_jax.checkpoint import Progress, Store, MetricsLog
from stackwise_jax.checkpoint import files
from stackwise_jax.errors import RunError
from stackwise_jax.memory.hashing import tree_hash
mesh = Mesh(np.asarray(jax.devices()), ("fsdp",))
values = np.arange(32, dtype=np.float32).reshape(8, 4)
spread, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
put = lambda s: jax.make_array_from_callback(values.shape, s, lambda i: values[i])
tree = {"spread": put(spread), "whole": put(whole)}
assert tree_hash(tree) == tree_hash({"spread": values, "whole": values})
store = Store(directory)
store.save_item("head", 1, tree, {"a": 1})
store.commit(Progress(1, 0, 1, 1, {"head": 1}))
for first, second, dtype in ((spread, whole, "float32"), (whole, spread, "bfloat16")):
    like = {k: jax.ShapeDtypeStruct((8, 4), dtype, sharding=s) for k, s in (("spread", first), ("whole", second))}
    for name, leaf in store.load_item("head", 1, like).items():
        assert leaf.sharding == like[name].sharding and leaf.dtype == dtype
        for shard in leaf.addressable_shards:
            assert (np.asarray(shard.data) == values[shard.index]).all()
metrics = MetricsLog(directory + "/metrics.jsonl")
metrics.append({"step": 1})
if index == 0:
    def full(*_):
        raise OSError(28, "No space left on device")
    files.os.replace = full
try:
    store.commit(Progress(2, 0, 2, 2, {"head": 1}))
except RunError as error:
    print("refused", flush=True)
"""


def test_two_processes_save_together_and_fail_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path), address, str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=100)
            assert process.returncode == 0 and out.endswith("refused\n"), err  # Gloo reports on stdout
    finally:
        for process in processes:
            process.kill()
    store, values = Store(tmp_path), np.arange(32, dtype=np.float32).reshape(8, 4)
    assert store.latest() == record(1, {"head": 1})
    assert same(store.load_item("head", 1), {"spread": values, "whole": values})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
