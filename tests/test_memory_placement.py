"""Meshes, shardings, explicit transfers, sizes."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from stackwise_jax.config.schema import MeshConfig
from stackwise_jax.memory import Placement, format_bytes, make_mesh, peak_host_bytes

FOUR_DEVICES = """
import jax, numpy as np, pytest
from jax.sharding import PartitionSpec as P
from stackwise_jax.config.schema import MeshConfig
from stackwise_jax.errors import UsageError
from stackwise_jax.memory import Placement, make_mesh

assert dict(make_mesh(MeshConfig()).shape) == {"data": 4, "fsdp": 1}
assert dict(make_mesh(MeshConfig(data=1, fsdp=4)).shape) == {"data": 1, "fsdp": 4}
for bad in (MeshConfig(fsdp=3), MeshConfig(data=3), MeshConfig(data=4, fsdp=2), MeshConfig(fsdp=0), MeshConfig(data=0)):
    with pytest.raises(UsageError, match="mesh"):
        make_mesh(bad)

placement = Placement(make_mesh(MeshConfig(fsdp=2)))
placement.check_batch(8)
with pytest.raises(UsageError, match="data.batch_size 6 .*mesh.data 2"):
    placement.check_batch(6)

tree = {"blocks": {"kernel": np.ones((8, 4, 6), np.float32), "scale": np.ones((8, 3), np.float32)},
        "embedding": np.ones((10, 4), np.float32), "step": np.float32(1)}
shardings = placement.params(tree)
specs = jax.tree.map(lambda s: s.spec, shardings)
assert specs["blocks"]["kernel"] == P(None, None, "fsdp")  # not the block axis, though it is the largest
assert specs["blocks"]["scale"] == P()  # nothing but the block axis divides
assert specs["embedding"] == P("fsdp") and specs["step"] == P()
with jax.transfer_guard("disallow"):
    put = placement.put(tree, shardings)
assert put["embedding"].addressable_shards[0].data.shape == (5, 4)
x = np.arange(24, dtype=np.int32).reshape(8, 3)
with jax.transfer_guard("disallow"):
    on_device = placement.put(x, placement.batch)
assert [s.data.shape for s in on_device.addressable_shards] == [(2, 3)] * 4
np.testing.assert_array_equal(on_device, x)
"""

TWO_PROCESSES = """
import sys, tempfile
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from stackwise_jax.config.schema import MeshConfig
from stackwise_jax.memory import ActivationCache, Placement, make_mesh

jax.distributed.initialize("127.0.0.1:" + sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
placement = Placement(make_mesh(MeshConfig(fsdp=2)))
x = np.arange(24, dtype=np.float32).reshape(8, 3)
key = jax.random.key(7)

def check(array, expected):
    assert array.shape == expected.shape and len(array.addressable_shards) == 2
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])

with jax.transfer_guard("disallow"):
    batch, key = placement.put((x, key), (placement.batch, placement.replicated))
    weights = placement.put({"w": np.ones((6, 4), np.float32)}, placement.params({"w": np.ones((6, 4), np.float32)}))
check(batch, x)
check(weights["w"], np.ones((6, 4), np.float32))
assert float(jax.jit(lambda a: a.sum())(batch)) == x.sum()
assert np.array_equal(jax.random.key_data(key).addressable_data(0), jax.random.key_data(jax.random.key(7)))

double = jax.jit(lambda a: 2 * a, out_shardings=placement.batch)
local = x.nbytes // 2
with ActivationCache(placement, kind="host", host_budget=2 * local, disk_budget=2 * local,
                     directory=tempfile.gettempdir(), read_ahead=1) as cache:
    cache.fill("a", range(4), lambda i: placement.put(x + i, placement.batch))
    assert (cache.host_bytes, cache.disk_bytes) == (2 * local, 2 * local)
    for i, h in zip([3, 0, 2, 1], cache.read("a", [3, 0, 2, 1]), strict=True):
        check(h, x + i)
    cache.advance("b", lambda i, h: double(h))
    for i, h in zip([3, 0], cache.read("b", [3, 0]), strict=True):
        check(h, 2 * (x + i))
print("done")
"""


def run_python(code, *args, devices):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture
def placement():
    return Placement(make_mesh(MeshConfig()))


def test_placement_is_a_value(placement):
    again = Placement(make_mesh(MeshConfig()))
    assert placement == again and hash(placement) == hash(again)


def test_put_gives_one_signature(placement):
    """Numpy, an uncommitted array, one on another kind of memory and a result of the function: one compile."""
    double = jax.jit(lambda x: 2 * x)
    x = np.ones((len(jax.devices()) * 2, 3), np.float32)
    first = placement.put(x, placement.batch)
    for leaf in (x, jnp.ones_like(x), placement.put(x, placement.host_batch), double(first)):
        put = placement.put(leaf, placement.batch)
        assert put.sharding == placement.batch
        double(put)
    assert double._cache_size() == 1
    assert placement.put(1e-3, placement.replicated).dtype == jnp.float32


def test_put_never_shares_memory_with_numpy(placement):
    buffer = np.zeros(1 << 16, np.uint8)
    start = -buffer.ctypes.data % 64  # a buffer that a CPU device would alias
    x = buffer[start : start + 4096].view(np.float32).reshape(len(jax.devices()) * 4, -1)
    on_device, on_host = placement.put(x, placement.batch), placement.put(x, placement.host_batch)
    x[:] = 1
    assert not np.asarray(on_device).any() and not np.asarray(on_host).any()


def test_host_batch_is_host_memory(placement):
    x = placement.put(np.ones((len(jax.devices()), 2), np.float32), placement.host_batch)
    assert x.sharding.memory_kind == "pinned_host"


def test_params_on_one_device_are_replicated(placement):
    tree = {"blocks": {"w": jax.ShapeDtypeStruct((2, 8, 8), jnp.float32)}}
    assert placement.params(tree)["blocks"]["w"].spec == P()


def test_four_devices():
    process = run_python(FOUR_DEVICES, devices=4)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


def test_two_processes():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [run_python(TWO_PROCESSES, port, str(i), devices=2) for i in range(2)]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 1023, 1536, 4 << 30, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "4.0 GiB",
        "5.0 TiB",
    ]


def test_peak_host_bytes_is_in_bytes():
    assert 10 << 20 < peak_host_bytes() < 1 << 40
