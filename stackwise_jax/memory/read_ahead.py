"""Load items in a background thread a few steps ahead of their use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def read_ahead(load: Callable[[Item], Loaded], order: Iterable[Item], depth: int) -> Generator[Loaded, None, None]:
    """Yield load(item) for each item of `order`, with at most `depth` loaded items waiting to be taken.

    `order` may be endless; it is walked in the thread. An exception of `order` or `load` is raised here, at the place
    of the item that failed. Closing or dropping the iterator ends the thread. depth 0 loads in the caller's thread.
    """
    if depth < 1:
        yield from map(load, order)
        return
    room, stop = threading.Semaphore(depth), threading.Event()
    ready: queue.SimpleQueue[list[Loaded] | BaseException | None] = queue.SimpleQueue()  # None: the end

    def work():
        try:
            for item in order:
                room.acquire()
                if stop.is_set():
                    return
                ready.put([load(item)])
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="read_ahead", daemon=True)
    thread.start()
    try:
        while (box := ready.get()) is not None:
            if isinstance(box, BaseException):
                raise box
            room.release()
            yield box.pop()  # popped, so that a suspended iterator keeps no device memory alive
    finally:
        stop.set()
        room.release()
        thread.join()
