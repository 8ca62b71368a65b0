"""What a path on the disk is, for people who look into it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PROGRESS = "progress"
VERSION = re.compile(r"\d{8}")


@dataclass(frozen=True)
class Location:
    """What a path on the disk is, for people who look into it."""

    kind: str  # run | store | item
    store: Path  # the store's directory
    name: str | None = None  # item: such as "stacks/003"
    version: int | None = None  # item: None when the path names the item and no version of it


def readable(path: Path | str) -> Location | None:
    """Say whether a path is a run (holds checkpoints/), a store, or an item of a store (with or without a version)."""
    path = Path(path).absolute()
    if not path.is_dir():
        return None
    if (path / "checkpoints" / PROGRESS).is_dir():
        return Location("run", path / "checkpoints")
    if (path / PROGRESS).is_dir():
        return Location("store", path)
    store = next((parent for parent in path.parents if (parent / PROGRESS).is_dir()), None)
    if store is None:
        return None
    version = int(path.name) if VERSION.fullmatch(path.name) else None
    item = path if version is None else path.parent
    if not any(VERSION.fullmatch(child.name) for child in item.iterdir()):
        return None
    return Location("item", store, item.relative_to(store).as_posix(), version)
