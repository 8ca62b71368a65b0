"""The frozen prefix of a phase: what the tokens pass before the first thing that learns.

Its output comes from the activation cache or is recomputed; both go through the same compiled functions, one stack at a
time, so they agree bitwise and compile once for all stacks of equal shape.

Legend: B batch, T sequence, D d_model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.config import parse_bytes
from stackwise_jax.config.schema import CacheConfig
from stackwise_jax.curriculum.phase import Phase
from stackwise_jax.data import Loader
from stackwise_jax.engine.programs import bare, embed_examples, run_stack
from stackwise_jax.engine.step import TaskSpec
from stackwise_jax.engine.weights import EMBED, Weights, stack_item
from stackwise_jax.memory import ActivationCache, CacheChoice, Conveyor, Placement, cache_key, choose_cache
from stackwise_jax.model import dtype_of
from stackwise_jax.objectives import Examples

Tell = Callable[[int, int], None] | None
FIXED_VISIT = 0  # the visit number under which fixed corruption is drawn


class Prefix:
    """The stacks of a phase's prefix, applied to examples.

    Raises:
        RunError: a stack could not be read back from its checkpoint.
    """

    def __init__(self, weights: Weights, phase: Phase, task: TaskSpec, placement: Placement, corruption_key: jax.Array):
        self._weights, self._phase, self._task = weights, phase, task
        self._placement, self._key = placement, corruption_key
        self._stacks = [bare(weights.rack.stacks[i]) for i in phase.prefix]
        self._arrivals = ThreadPoolExecutor(1, thread_name_prefix="arriving")

    @property
    def layers(self) -> list[list[str]]:
        """The items whose content decides the output: those of the embedding, then those of each stack."""
        return [[EMBED], *([stack_item(i), *self._weights.adapter_items(i)] for i in self._phase.prefix)]

    def embed(self, examples: Examples, visit: jax.Array) -> jax.Array:
        """Corrupt and embed: x_BTD."""
        embed = self._weights.on_device(EMBED)
        return embed_examples(self._task, embed, examples, self._key, visit)

    def stack(self, position: int) -> Callable[[jax.Array, Examples], jax.Array]:
        """The position-th stack of the prefix, brought to the device, as a function of activations and examples."""
        params = self._weights.full_on_device(self._phase.prefix[position])
        return functools.partial(run_stack, self._task, self._stacks[position], params)

    def __call__(self, examples: Examples, visit: jax.Array) -> jax.Array:
        """The output of the prefix, x_BTD in the compute dtype.

        Stacks that rest off the device come one ahead of the one in use.
        """
        x_BTD = self.embed(examples, visit)
        if all(self._weights.places[item] == "device" for layer in self.layers[1:] for item in layer):
            for position in range(len(self._stacks)):
                x_BTD = self.stack(position)(x_BTD, examples)
            return x_BTD
        belt = Conveyor(self._weights.full_on_device, self._phase.prefix, self._arrivals)
        before = None
        for stack in self._stacks:
            y_BTD = run_stack(self._task, stack, belt.take(), x_BTD, examples)
            belt.advance(before)
            before = x_BTD = y_BTD
        return x_BTD


def put_examples(placement: Placement, examples: Examples) -> Examples:
    """Host examples onto the devices, split along the batch."""
    return placement.put(examples, placement.batch)


class PrefixCache:
    """The activation cache of a run, kept from phase to phase where the next phase can build on it."""

    def __init__(self, cfg: CacheConfig, placement: Placement, directory: Path):
        self._cfg, self._placement = cfg, placement
        self._directory = Path(cfg.dir) if cfg.dir else directory
        self._cache: ActivationCache | None = None
        self._parts: dict[str, Any] = {}  # what the chunks were made of, besides the items
        self._hashes: list[str] = []  # content of the layers that the chunks have passed

    def choose(self, phase: Phase, loader: Loader, task: TaskSpec) -> CacheChoice:
        """Whether and where the prefix of this phase is cached, and why."""
        return choose_cache(
            self._cfg.kind,
            phase_visits=phase.steps,
            dataset_batches=loader.n_batches,
            chunk_bytes=self.chunk_bytes(loader, task),
            host_budget=parse_bytes(self._cfg.host_budget, "cache.host_budget"),
            disk_budget=parse_bytes(self._cfg.disk_budget, "cache.disk_budget"),
            has_prefix=bool(phase.prefix),
            corruption=phase.corruption,
        )

    def chunk_bytes(self, loader: Loader, task: TaskSpec) -> int:
        """Bytes of the activations of one batch on this process."""
        elements = loader.batch_size * loader.dataset.tokens_NT.shape[1] * task.rack.d_model
        return elements * jnp.dtype(dtype_of(task.rack.compute_dtype)).itemsize // jax.process_count()

    def prepare(
        self, prefix: Prefix, weights: Weights, phase: Phase, loader: Loader, kind: str, data: str, tell: Tell = None
    ) -> int | None:
        """Make the cache hold the prefix's output for every batch of the phase.

        A cache that holds the output of the first stacks of this prefix is pushed through the rest; any other is filled
        anew. `tell` hears (done, total) after each batch. Returns through how many stacks the cache was pushed, None
        when it was filled.
        """
        ids = list(dict.fromkeys(loader.batch_id(i) for i in range(min(phase.steps, loader.n_batches))))
        parts = {
            "objective": repr(phase.objective),
            "noise": repr(phase.noise),
            "attention_mode": phase.attention_mode,
            "seed": phase.seed,
            "data": data,
            "batches": ids,
            "kind": kind,
        }
        content = lambda item: f"{weights.formats[item]}:{weights.content_hash(item)}"
        hashes = [" ".join(map(content, layer)) for layer in prefix.layers]
        done = len(self._hashes)
        fits = self._cache is not None and parts == self._parts and 0 < done <= len(hashes)
        if fits and hashes[:done] == self._hashes:
            advanced = len(hashes) - done
        else:
            self.close()
            self._cache = ActivationCache(
                self._placement,
                kind="disk" if kind == "disk" else "host",
                host_budget=parse_bytes(self._cfg.host_budget, "cache.host_budget"),
                disk_budget=parse_bytes(self._cfg.disk_budget, "cache.disk_budget"),
                directory=self._directory,
                read_ahead=self._cfg.read_ahead,
            )
            visit = self._placement.put(np.int32(FIXED_VISIT), self._placement.replicated)
            embedded = cache_key(**parts, prefix=hashes[:1])
            self._cache.fill(embedded, ids, lambda i: prefix.embed(self._examples(loader, i), visit), tell)
            done, advanced = 1, None
        cache = self._cache
        assert cache is not None
        self._parts, self._hashes = parts, []  # nothing is valid until the last advance has ended
        # Stack by stack over all batches, so that each stack is brought to the device once.
        for passed in range(done, len(hashes)):
            forward = prefix.stack(passed - 1)
            key = cache_key(**parts, prefix=hashes[: passed + 1])
            cache.advance(key, lambda i, x, forward=forward: forward(x, self._examples(loader, i)), tell)
        self._hashes, self._key = hashes, cache_key(**parts, prefix=hashes)
        return advanced

    def _examples(self, loader: Loader, batch_id: int) -> Examples:
        return put_examples(self._placement, loader.examples(batch_id))

    def read(self, order: Iterable[int]) -> Iterator[jax.Array]:
        """The chunks of these batch ids, on the device, read ahead."""
        assert self._cache is not None
        return self._cache.read(self._key, order)

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes held in host memory and on disk."""
        if self._cache is None:
            return {"host": 0, "disk": 0}
        return {"host": self._cache.host_bytes, "disk": self._cache.disk_bytes}

    def close(self) -> None:
        """Release the chunks and remove the spill file."""
        if self._cache is not None:
            self._cache.close()
        self._cache, self._parts, self._hashes = None, {}, []
