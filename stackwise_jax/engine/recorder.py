"""What a run writes down: items, progress records and the metrics file, so that a kill at any moment loses nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax

from stackwise_jax.checkpoint import MetricsLog, Progress, Store, by_first_process
from stackwise_jax.curriculum import Phase
from stackwise_jax.engine import entries
from stackwise_jax.engine.weights import Weights, count_values, final_format, path_items
from stackwise_jax.errors import RunError

Tree = Any
OPTIMIZER, MOMENTS = "optimizer", "moments/"
PART_BYTES = 2**30  # of optimizer state, saved at a time: what is being saved is in host memory as a whole


class Recorder:
    """The saved side of a run: what has been committed, and how to commit more.

    number, global_step, results: of the state that the next record will describe. moments: the versions of the
    optimizer state that items keep for a later phase.

    Args:
        run_dir: where a run was begun.
        store: its checkpoints, locked.
        data: goes into every record: the fingerprints of what the run must find again.
    """

    def __init__(self, run_dir: Path, store: Store, data: dict[str, str]):
        self.store = store
        self.log = MetricsLog(run_dir / entries.METRICS)
        self.weights: Weights  # set by the run once the store can be read
        self.number = self.global_step = 0
        self.results: list[dict] = []
        self.moments: dict[str, int] = {}
        self._run_dir, self._data = run_dir, data
        self._digests = entries.digests(run_dir) if jax.process_index() == 0 else {}  # that process writes records

    def go_on_from(self, progress: Progress) -> None:
        """Take up a committed state: counters, results, versions, and the metrics file as it was then."""
        self.number, self.global_step = progress.number, progress.global_step
        self.results = list(progress.results)
        versions = {name: v for name, v in progress.versions.items() if name.split("/")[0] != OPTIMIZER}
        self.moments = {n.removeprefix(MOMENTS): v for n, v in versions.items() if n.startswith(MOMENTS)}
        self.weights.versions = {name: v for name, v in versions.items() if not name.startswith(MOMENTS)}
        self.weights.formats = {item: fmt for item, fmt in progress.formats.items() if item in self.weights.versions}
        self._data = progress.data | self._data
        self._digests = progress.digests or self._digests
        self.log.truncate(progress.metrics_bytes)

    def grow(self, item: str, phase_name: str, **how: Any) -> None:
        """Initialise an item and save it at once: its full-precision copy is never only in memory."""
        self.weights.grow(item, **how)
        self.keep(item, self.weights.trees[item], phase_name)

    def keep(self, item: str, tree: Tree, phase_name: str) -> None:
        """Take a tree as an item in full precision, and save it."""
        self.weights.set(item, tree, self.weights.master)
        self.save_learned({item: tree}, {"phase": phase_name, "loss_history": []})

    def save_learned(self, trees: dict[str, Tree], meta: dict) -> None:
        """Save new versions of items in the formats that they have; they count once `commit` has named them."""
        for item, tree in trees.items():
            about = meta | {"kind": item.split("/")[0], "format": self.weights.formats[item]}
            about["values"] = count_values(tree)
            if item in self.weights.adapters:
                about["adapter"] = dataclasses.asdict(self.weights.adapters[item].spec)
            self.store.save_item(item, self.number + 1, tree, about)
            self.weights.versions[item] = self.number + 1

    def settle(self, phases: Sequence[Phase], index: int, learned: dict[str, Tree], *, frozen: bool) -> dict[str, Tree]:
        """Have the path of a phase that has ended in memory, as it will be kept.

        Args:
            learned: the trees of what learned, in full precision; emptied, so that they go where they are converted.
            frozen: items of the path that no later phase needs in full precision are kept in their final format.

        Returns:
            The trees that have to be saved: of what learned, and of what is no longer kept in full precision.
        """
        weights, changed = self.weights, list(learned)
        for item in changed:
            weights.set(item, learned.pop(item), weights.master)
        for item in path_items(phases[index]):
            fmt = weights.formats[item]
            if frozen and (item in changed or weights.saved_format(item) == weights.master):
                final = final_format(phases, index, item, weights.master)
                if final != weights.master:
                    fmt = final
                    changed += [] if item in changed else [item]
            weights.ensure(item, fmt, weights.places.get(item, "device"))
        return {item: weights.trees[item] for item in changed}

    def forget_depths(self, keep: int | None, apart: Collection[int]) -> None:
        """Of the phases that have ended let all but the newest `keep` go: their results stay, the versions of items
        that only they need do not. None: keep all. apart: phases that are models of their own, which stay."""
        if keep is None:
            return
        named = lambda result: "versions" in result and result["index"] not in apart
        ended = [i for i, result in enumerate(self.results) if named(result)]
        for i in ended[: max(len(ended) - keep, 0)]:
            self.results[i] = {k: v for k, v in self.results[i].items() if k not in ("versions", "formats")}

    def save_moments(self, item: str, state: dict[str, jax.Array], meta: dict) -> None:
        """Save optimizer state that an item will go on with, or what else of it a phase comes back to."""
        names = sorted(state)
        leaves = {f"{i:04d}": state[name] for i, name in enumerate(names)}
        if leaves:
            self.store.save_item(MOMENTS + item, self.number + 1, leaves, meta | {"kind": "moments", "names": names})
            self.moments[item] = self.number + 1

    def load_moments(self, item: str, like: dict[str, jax.Array], about: dict) -> dict[str, jax.Array]:
        """What `save_moments` saved for an item, as `like`; nothing if its meta differs from `about`."""
        name, version = MOMENTS + item, self.moments[item]
        meta, shapes = self.store.item_meta(name, version), self.store.item_shapes(name, version)
        files = {leaf: f"{i:04d}" for i, leaf in enumerate(meta["names"])}
        alike = files.keys() == like.keys() and all(shapes[files[n]].shape == x.shape for n, x in like.items())
        if not alike or any(meta[key] != value for key, value in about.items()):
            return {}
        wanted = {files[name]: _shape_of(x) for name, x in like.items()}
        saved = self.store.load_item(name, version, wanted)
        return {leaf: saved[files[leaf]] for leaf in like}

    def save_inside(
        self, learned: dict[str, Tree], opt: dict[str, Tree], meta: dict, extra: dict, bad_steps: int
    ) -> None:
        """A checkpoint in the middle of a phase: what learns, its optimizer state, and where the loop stands."""
        self.save_learned(learned, meta)
        saved = {}
        for name, tree in opt.items():
            for item, leaves in optimizer_items(name, tree):
                saved[item] = self.number + 1
                self.store.save_item(item, self.number + 1, leaves, meta | {"kind": OPTIMIZER})
        self.commit(meta["phase_index"], meta["step"], optimizer=saved, extra=extra, bad_steps=bad_steps)

    def commit(
        self,
        phase: int,
        step: int,
        *,
        finished: bool = False,
        optimizer: dict[str, int] | None = None,
        extra: dict | None = None,
        bad_steps: int = 0,
    ) -> Progress:
        """Make everything saved so far the newest state.

        Raises:
            RunError: a file that describes the run was changed or removed since it began, so that nobody could open
                what this would commit; or as `Store.commit`. The state before stays the newest.
        """
        self.number += 1
        self.log.sync()
        by_first_process(lambda: entries.check_digests(self._run_dir, self._digests))
        progress = Progress(
            number=self.number,
            phase=phase,
            step=step,
            global_step=self.global_step,
            versions=self.weights.versions
            | {MOMENTS + item: version for item, version in self.moments.items()}
            | (optimizer or {}),
            formats=dict(self.weights.formats),
            data=self._data,
            digests=self._digests,
            metrics_bytes=self.log.tell(),
            results=self.results,
            bad_steps=bad_steps,
            finished=finished,
            extra=extra or {},
        )
        self.store.commit(progress)
        return progress

    def load_optimizer(self, progress: Progress, name: str, opt: Tree) -> Tree:
        """An entry of the optimizer state that `progress` names, with the structure and shardings of `opt`."""
        saved: dict[str, jax.Array] = {}
        for item, leaves in optimizer_items(name, opt):
            if item not in progress.versions:
                raise RunError(f"record {progress.number} of {self.store.directory} is damaged: versions has no {item}")
            like = {number: _shape_of(x) for number, x in leaves.items()}
            saved |= self.store.load_item(item, progress.versions[item], like)
        return jax.tree.unflatten(jax.tree.structure(opt), [saved[number] for number in sorted(saved)])

    def close(self) -> None:
        """Close the metrics file and let another process write here."""
        self.log.close()
        self.store.close()


def optimizer_items(name: str, opt: Tree) -> list[tuple[str, dict[str, Any]]]:
    """(item, its leaves by number) of an entry of an executor's optimizer state, of arrays or their shapes; "" is the
    whole. Large ones are in several items, which follow from the shapes alone."""
    parts: list[dict[str, Any]] = []
    held = 0
    for i, leaf in enumerate(jax.tree.leaves(opt)):
        n = leaf.size * leaf.dtype.itemsize
        if not parts or held + n > PART_BYTES:
            parts.append({})
            held = 0
        parts[-1][f"{i:04d}"] = leaf
        held += n
    first = f"{OPTIMIZER}/{name}" if name else OPTIMIZER
    return [(f"{first}/part{k}" if k else first, leaves) for k, leaves in enumerate(parts)]


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    """What an array at rest is read back as: to its own place, or to a numpy array where it rests on disk."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
