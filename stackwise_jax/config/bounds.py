"""The largest values of keys. Each is above what anybody could mean, and low enough to be refused before it is used.

They keep a misplaced digit from filling the memory or running for days before anything is said.
"""

from __future__ import annotations

import re

from stackwise_jax.config.keys import values_of
from stackwise_jax.config.schema import StackWiseConfig
from stackwise_jax.config.values import shown
from stackwise_jax.errors import UsageError

SEED = 2**32 - 1  # what numpy takes
COUNTER = 2**31 - 1  # steps are counted in int32
PHASE_STEPS = 10**9  # a billion steps at a millisecond each take 12 days
BLOCKS = 10_000  # of a rack; the deepest transformers that were trained have about 1,000
PHASES = 100_000  # of a plan: each is an object of its own, and a record
PASSES = 5_000_000  # stacks that the phases of a plan pass, all together: 2,200 stacks, each a phase of plan stackwise
WIDTH = 2**20  # the widest models have about 2^15
TOKENS = 2**24  # of a sequence: 16 million
SAMPLE = 100_000  # tokens of a text that is generated: more than any sequence that small models see
RANK = 2**16  # of an adapter; beyond the width of its matrix it is no adapter
ENTRIES = 10_000  # of a list
TEXT = 100_000  # characters of a text
BYTES = 2**60  # of a size such as 4GiB: an exabyte

LARGEST = {
    "run.seed": SEED,
    "run.sample_tokens": SAMPLE,
    "data.seq_len": TOKENS,
    "data.batch_size": 2**20,
    "data.synthetic_tokens": 10**8,  # made in memory at once, with 30 bytes for each
    "tokenizer.vocab_size": 2**20,
    "model.d_model": WIDTH,
    "model.n_heads": 2**16,
    "model.n_kv_heads": 2**16,
    "model.d_ff": 2**24,
    "model.vocab_size": 2**24,
    "model.vocab_multiple": 2**20,
    "model.architecture.n_stacks": BLOCKS,
    "model.architecture.blocks_per_stack": BLOCKS,
    "model.mla.rq": WIDTH,
    "model.mla.rkv": WIDTH,
    "model.mla.nope_dim": WIDTH,
    "model.mla.rope_dim": WIDTH,
    "model.mla.v_dim": WIDTH,
    "model.kernel.features": WIDTH,
    "curriculum.steps": PHASE_STEPS,
    "curriculum.stages.steps": PHASE_STEPS,
    "curriculum.phases.steps": PHASE_STEPS,
    "curriculum.block_size": BLOCKS,
    "curriculum.rounds": PHASES,
    "curriculum.overlap": BLOCKS,
    "curriculum.adapters.rank": RANK,
    "curriculum.adapters.trunk_rank": RANK,
    "curriculum.adapters.table.rank": RANK,
    "optimizer.microbatches": 2**20,
    "cache.read_ahead": 1024,  # chunks on the device
    "mesh.data": 2**20,  # devices
    "mesh.fsdp": 2**20,
    "mesh.num_processes": 2**20,
}


def check_bounds(config: StackWiseConfig) -> None:
    """Refuse a whole number, a list or a text that is larger than anything that could be meant.

    Raises:
        UsageError: one sentence with the key, its value and the largest that is taken.
    """
    for key, value in values_of(config):
        if isinstance(value, list) and len(value) > ENTRIES:
            raise UsageError(f"{key} has {len(value):,} entries; write at most {ENTRIES:,}")
        if isinstance(value, str) and len(value) > TEXT:
            raise UsageError(f"{key} has {len(value):,} characters; write at most {TEXT:,}")
        if isinstance(value, int) and not isinstance(value, bool):
            largest = LARGEST.get(_plain(key), COUNTER)
            if not -COUNTER <= value <= largest:
                raise UsageError(f"{key} is {shown(value)}; write at most {largest}")
    depth = config.model.architecture
    if depth.n_stacks * depth.blocks_per_stack > BLOCKS:
        raise UsageError(
            f"model.architecture.n_stacks is {depth.n_stacks} and model.architecture.blocks_per_stack "
            f"{depth.blocks_per_stack}; write at most {BLOCKS:,} blocks in all"
        )


def _plain(key: str) -> str:
    """The name of a key in LARGEST: without the places in lists, those of plans as those of the curriculum itself."""
    key = re.sub(r"\[\d+\]", "", key).replace("curriculum.plans.", "curriculum.")
    section, _, name = key.rpartition(".optimizer.")
    return f"optimizer.{name}" if section else key
