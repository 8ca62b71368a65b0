"""Train several runs in one process and note how their arrays lay on the devices: see test_devices.py.

Usage: python devices_worker.py REPORT [ARGUMENTS, ...]: a JSON list of argument lists of train; REPORT is written by
each process of a run, with its number at the end of the name.
"""

import itertools
import json
import sys
from pathlib import Path

import jax

import stackwise_jax.engine.run as engine
from stackwise_jax.memory import ActivationCache
from stackwise_jax.train import main

seen: list[dict] = []  # one per phase
run_phase, fill = engine.run_phase, ActivationCache.fill


def share_of_a_device(tree) -> float:
    """The largest share of the tree's bytes that lies on one device of this process."""
    leaves = jax.tree.leaves(tree)
    held: dict = {}
    for shard in itertools.chain.from_iterable(leaf.addressable_shards for leaf in leaves):
        held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values()) / sum(leaf.nbytes for leaf in leaves)


def watched_phase(step, feed, steps, **calls):
    first, executor = next(feed), step.__self__
    state = executor.state
    seen.append({"learning": share_of_a_device(state.learning), "optimizer": share_of_a_device(state.opt)})
    seen[-1]["examples"] = share_of_a_device(first.examples)
    if first.hidden_BTD is not None:
        seen[-1]["hidden"] = share_of_a_device(first.hidden_BTD)
    del state
    run_phase(step, itertools.chain([first], feed), steps, **calls)
    seen[-1]["after"] = share_of_a_device(executor.state.learning)


def watched_fill(cache, key, ids, produce, progress=None):
    fill(cache, key, ids, produce, progress)
    chunks = list(cache._host.values())
    kinds = sorted({chunk.sharding.memory_kind for chunk in chunks})
    seen.append({"chunks": len(cache.ids), "bytes": cache.host_bytes + cache.disk_bytes, "memory_kinds": kinds})
    if chunks:
        seen[-1]["chunk"] = share_of_a_device(chunks)


if __name__ == "__main__":
    engine.run_phase, ActivationCache.fill = watched_phase, watched_fill
    codes = [main(argv) for argv in json.loads(sys.argv[2])]
    report = {"devices": jax.device_count(), "processes": jax.process_count(), "seen": seen}
    Path(f"{sys.argv[1]}{jax.process_index()}").write_text(json.dumps(report))
    sys.exit(max(codes))
