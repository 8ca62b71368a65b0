"""What learns in a phase, cut into parts, and where each part rests while it is not on the device.

A part is a stack of the window, the embedding or the head. Its weights have one home, its optimizer state another.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from stackwise_jax.config.schema import MemoryConfig
from stackwise_jax.memory import Place, Placement, Scratch, rest
from stackwise_jax.memory.offload import guarded

Tree = Any
Part = int | str  # a stack, by its place in the window; EMBED; HEAD


def homes(cfg: MemoryConfig) -> tuple[Place, Place]:
    """Where what learns rests between its uses, and where its optimizer state does (and gradients that wait)."""
    away: Place = cfg.offload_to
    weights: Place = away if cfg.offload == "all" else "device"
    optimizer: Place = away if cfg.offload in ("trunk+optimizer", "all") else "device"
    return weights, optimizer


class Holdings:
    """The parts at rest. One part may be on its way home while others are computed. Whoever fetches a part that is
    still on its way waits for it; `settle` waits in any case.

    learning, opt: by part. waiting: gradients that wait for the norm of the whole.

    Args:
        learning: at rest.
        fresh: the optimizer state that a part begins with, from its weights on the device.
        scratch: for what rests on disk.
    """

    def __init__(
        self,
        placement: Placement,
        scratch: Scratch | None,
        cfg: MemoryConfig,
        learning: dict[Part, Tree],
        fresh: Callable[[Part, Tree], Tree],
    ):
        self._placement, self._scratch = placement, scratch
        self._home: Place
        self._opt_home: Place
        self._home, self._opt_home = homes(cfg)
        self._departures = ThreadPoolExecutor(1, thread_name_prefix="leaving")
        self._leaving: dict[Part, Future] = {}  # at most one
        self.learning = {part: self._rest(tree, self._home) for part, tree in learning.items()}
        self.opt: dict[Part, Tree] = {}
        self.waiting: dict[Part, Tree] = {}
        self._space: dict[Part, Tree] = {}  # on disk, where gradients wait
        for part in self.learning:  # one after the other, so that one part's state is on the device
            self.keep_opt(part, jax.block_until_ready(fresh(part, self.weights_of(part))))

    def weights_of(self, part: Part) -> Tree:
        """The weights of a part in device memory."""
        if self._home != "device":
            self._wait_for(part)
        return self.fetch(self.learning[part])

    def opt_of(self, part: Part) -> Tree:
        """The optimizer state of a part in device memory."""
        self._wait_for(part)
        return self.fetch(self.opt[part])

    def fetch(self, tree: Tree) -> Tree:
        """A tree in device memory: itself if it rests there, else a copy on its way."""
        return self._placement.put(tree, self._placement.params(tree))

    def keep_opt(self, part: Part, opt: Tree) -> None:
        """Replace the optimizer state of a part."""
        self.opt[part] = jax.block_until_ready(self._rest(opt, self._opt_home, self.opt.get(part)))

    def send_home(self, part: Part, learning: Tree, opt: Tree) -> None:
        """Replace weights and optimizer state of a part by what is being computed."""
        if self._home == "device":  # there already, so the next forward pass need not wait for the state to leave
            self.learning[part] = self._rest(learning, "device")

        coming = [learning, opt]

        def arrive() -> None:
            learning, opt = coming
            coming.clear()  # the device memory is free once they are home, not only once this function is gone
            if self._home != "device":
                self.learning[part] = self._rest(learning, self._home, self.learning[part])
            self.opt[part] = self._rest(opt, self._opt_home, self.opt[part])

        self._leave(arrive, (self.learning, self.opt), part)

    def send_gradient(self, part: Part, gradient: Tree) -> None:
        """Let a gradient that is being computed wait where the optimizer state rests."""
        coming = [gradient]

        def arrive() -> None:
            self.waiting[part] = self._rest(coming.pop(), self._opt_home, self._space.get(part))
            if self._opt_home == "disk":
                self._space[part] = self.waiting[part]

        self._leave(arrive, (self.waiting,), part)

    def settle(self) -> None:
        """Wait for what is on its way.

        Raises:
            RunError: the disk is full.
        """
        for part, leaving in [*self._leaving.items()]:
            try:
                leaving.result()
            finally:  # only now: in another thread somebody may look whether it is still on its way
                del self._leaving[part]

    def _wait_for(self, part: Part) -> None:
        """Wait for a part if it is on its way; it may be asked in any thread."""
        leaving = self._leaving.get(part)
        if leaving is not None:
            leaving.result()

    def _leave(self, arrive: Callable[[], None], kept: tuple[dict, ...], part: Part) -> None:
        if self._home == self._opt_home == "device":
            return arrive()
        # What left before is home: its device memory is free before more is fetched.
        self.settle()

        def leave() -> None:
            arrive()
            jax.block_until_ready([tree[part] for tree in kept])

        self._leaving[part] = self._departures.submit(guarded, leave)

    def _rest(self, tree: Tree, place: Place, into: Tree | None = None) -> Tree:
        return rest(self._placement, tree, place, self._scratch, into)
