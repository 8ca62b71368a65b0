"""The arrays of an item on the disk: written by Orbax, checked before a byte is allocated for them, read back.

    <arrays>/<leaf>/.zarray     shape, dtype and shape of the chunks (zarr, version 2), without compression
    <arrays>/<leaf>/0.1         a chunk: what one device holds of the leaf, as raw bytes

Orbax can also keep all leaves in one OCDBT database, and does so by default. To make it, it looks for the files of each
process with a pattern that contains the whole path, so it finds nothing where the path has a bracket, and says nothing.
Chunks in files of their own need no such step: every process writes its own, on any file system. That they can be read
is seen from their names and sizes. Items of version 0.1 are such databases and are read by TensorStore.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import logging
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stackwise_jax.checkpoint.database import check_index
from stackwise_jax.checkpoint.fields import array_bytes
from stackwise_jax.checkpoint.files import brief
from stackwise_jax.errors import RunError
from stackwise_jax.files import read_regular

ARRAYS = "arrays"
DATABASE = f"{ARRAYS}/manifest.ocdbt"
LARGE = 2**25  # bytes
READ_BACK = 2**20  # bytes; so much of an item is read back and compared before the item gets its name
METADATA = 2**16  # bytes, the most that the description of a leaf may have
_PLAIN = re.compile(r"[\w/.,+=@ -]*")

Sizes = dict[str, int]  # file of an item, relative to it -> bytes
Read = Callable[[tuple[slice, ...]], np.ndarray]  # a part of a leaf


def save_arrays(path: Path, leaves: dict[str, Any]) -> None:
    """Write arrays that are not empty to the new directory `path`. Every process calls this."""
    import orbax.checkpoint as ocp

    with _plain(path.parent) as parent, jax.transfer_guard("allow"):
        _checkpointer().save(parent / path.name, args=ocp.args.PyTreeSave(nested(leaves)))
    _release(leaves.values())


def check_arrays(item: Path, table: dict[str, dict], sizes: Sizes) -> dict[str, Read]:
    """Compare what the table of leaves declares with what lies on the disk, without reading an array.

    Args:
        table: leaf name -> {"shape", "dtype"}.
        sizes: the files of the item, all of them regular ones.

    Returns:
        For each leaf that is not empty a function that reads a part of it.

    Raises:
        RunError: a leaf is missing or larger than its files, its own metadata say otherwise, or it is compressed.
    """
    table = {name: entry for name, entry in table.items() if 0 not in entry["shape"]}
    if DATABASE in sizes:
        return _open_database(item, table, sizes)
    return {name: _open_chunks(item, name, entry, sizes) for name, entry in table.items()}


def nested(leaves: dict[str, Any]) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}"""
    tree: dict = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def raw(array: np.ndarray) -> np.ndarray:
    """The bytes of an array, without a copy where they lie in one piece."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _open_chunks(item: Path, name: str, entry: dict, sizes: Sizes) -> Read:
    folder = f"{ARRAYS}/{name.replace('/', '.')}"
    try:
        described = json.loads(read_regular(item / folder / ".zarray", METADATA, follow=False))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{item / folder / '.zarray'} cannot be read: {brief(error)}") from error
    shape, chunk = entry["shape"], _check_described(item / folder, described, entry)
    counts = [-(-n // size) for n, size in zip(shape, chunk, strict=True)]
    if math.prod(counts) > len(sizes):
        raise RunError(f"{item / folder} is damaged: it describes {math.prod(counts):,} chunks and has fewer")
    n_bytes = array_bytes({"shape": chunk, "dtype": entry["dtype"]})
    for place in itertools.product(*map(range, counts)):
        file = f"{folder}/{_chunk_name(place)}"
        if sizes.get(file) != n_bytes:
            found = f"has {sizes[file]:,} bytes" if file in sizes else "is missing"
            raise RunError(f"{item / file} is damaged: it {found}, not {n_bytes:,}")
    return functools.partial(_read_chunks, item / folder, np.dtype(entry["dtype"]), tuple(shape), tuple(chunk))


def _check_described(where: Path, described: Any, entry: dict) -> list[int]:
    """The shape of the chunks, if a leaf's own metadata agree with the table of leaves and with how we write."""
    dtype = np.dtype(entry["dtype"])
    expected = {
        "zarr_format": 2,
        "shape": entry["shape"],
        "dtype": dtype.str if dtype.isbuiltin == 1 else dtype.name,
        "compressor": None,
        "filters": None,
        "order": "C",
    }
    described = described if isinstance(described, dict) else {}
    for key, value in expected.items():
        if described.get(key) != value:
            found = str(described.get(key))[:60]
            raise RunError(f"{where} is damaged: its {key} is {found} and has to be {value}")
    chunk = described.get("chunks")
    good = isinstance(chunk, list) and len(chunk) == len(entry["shape"])
    if not good or not all(type(c) is int and 1 <= c <= n for c, n in zip(chunk, entry["shape"], strict=True)):
        raise RunError(f"{where} is damaged: its chunks are {str(chunk)[:60]}, its shape is {entry['shape']}")
    return chunk


def _read_chunks(
    folder: Path, dtype: np.dtype, shape: tuple[int, ...], chunk: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """A part of a leaf. A file that is all of what is asked for is read in place; of others what is needed."""
    bounds = [part.indices(n)[:2] for part, n in zip(index, shape, strict=True)]
    length = tuple(stop - start for start, stop in bounds)
    if length == chunk and not any(start % size for (start, _), size in zip(bounds, chunk, strict=True)):
        place = [start // size for (start, _), size in zip(bounds, chunk, strict=True)]
        return _whole_file(folder / _chunk_name(place), math.prod(chunk) * dtype.itemsize).view(dtype).reshape(chunk)
    out = np.empty(length, dtype)
    touched = [range(start // size, -(-stop // size)) for (start, stop), size in zip(bounds, chunk, strict=True)]
    for place in itertools.product(*touched):
        bytes_of = np.memmap(folder / _chunk_name(place), np.uint8, "r")
        source, target = [], []
        for p, size, (start, stop) in zip(place, chunk, bounds, strict=True):
            low, high = max(start, p * size), min(stop, (p + 1) * size)
            source.append(slice(low - p * size, high - p * size))
            target.append(slice(low - start, high - start))
        out[tuple(target)] = bytes_of.view(dtype).reshape(chunk)[tuple(source)]
    return out


def _whole_file(path: Path, n_bytes: int) -> np.ndarray:
    content = np.empty(n_bytes, np.uint8)
    rest = memoryview(content.data)
    with open(path, "rb", buffering=0) as file:
        while rest:  # one call reads at most 2 GiB
            n = file.readinto(rest)
            if not n:
                raise OSError(f"{path} ends early")
            rest = rest[n:]
    return content


def _chunk_name(place: Iterable[int]) -> str:
    return ".".join(map(str, place)) or "0"  # an array without dimensions has one chunk


def _open_database(item: Path, table: dict[str, dict], sizes: Sizes) -> dict[str, Read]:
    """The leaves of an item of version 0.1. Their metadata are read here, their content later."""
    declared, present = sum(map(array_bytes, table.values())), sum(sizes.values())
    if declared > present:
        raise RunError(f"{item} is damaged: its leaves have {declared:,} bytes and its files {present:,}")
    check_index(item, sizes)
    for name, entry in table.items():
        with _plain(item / ARRAYS) as path:
            try:
                described = _in_database(path, name).spec().to_json()["metadata"]
            except (ValueError, OSError, RuntimeError) as error:
                raise RunError(f"{item / ARRAYS} is damaged: {brief(error)}") from error
        _check_described(item / ARRAYS / name, described, entry)
    return {name: functools.partial(_read_database, item, name) for name in table}


def _read_database(item: Path, name: str, index: tuple[slice, ...]) -> np.ndarray:
    with _plain(item / ARRAYS) as path:
        return np.asarray(_in_database(path, name)[index].read().result())


def _in_database(path: Path, name: str) -> Any:
    import tensorstore as ts

    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}, "path": f"{name.replace('/', '.')}/"}
    return ts.open({"driver": "zarr", "kvstore": database}, open=True).result()


@contextlib.contextmanager
def _plain(path: Path) -> Iterator[Path]:
    """The same directory under a path that TensorStore takes as it is: it takes a backslash for a slash and refuses
    `..` and other names. Each process makes its own link, so that nothing in the directory itself changes."""
    if ".." in path.parts:
        path = path.resolve()
    if _PLAIN.fullmatch(str(path)) and ".__lock" not in str(path):
        yield path
        return
    with _link_to(path) as link:
        yield link


@contextlib.contextmanager
def _link_to(path: Path) -> Iterator[Path]:
    """A link to a directory, in the first temporary directory with a plain name that takes one."""
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if not _PLAIN.fullmatch(parent):
            continue
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="stackwise_jax", dir=parent))
                link = Path(folder, "item")
                link.symlink_to(path, target_is_directory=True)
            except OSError:  # it is not there, or full
                continue
            yield link
            return
    raise RunError(f"{path} has a name that needs a temporary directory, and none takes a link; set TMPDIR to one")


def _release(arrays: Iterable[Any]) -> None:
    """Collect what Orbax leaves in cycles, arrays among it, where that is too much to wait for."""
    if sum(array.nbytes for array in arrays) >= LARGE:
        gc.collect()


def _report_unraisable(report: Callable[[Any], Any], unraisable: Any) -> None:
    """Report all but one thing: after a failed write TensorStore tells of the other writes to a loop that is closed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        report(unraisable)


@functools.cache
def _checkpointer():
    """One synchronous Orbax checkpointer for the process; its log lines are dropped: what fails is raised.

    It takes no copies of host arrays, which nobody changes meanwhile, and does not compress: random weights shrink by
    a few percent, quantized ones not at all, and zstd takes several times as long as the disk.
    """
    import orbax.checkpoint as ocp

    sys.unraisablehook = functools.partial(_report_unraisable, sys.unraisablehook)
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    # Of several writes that fail together one is raised; asyncio would print the others when they are collected.
    logging.getLogger("asyncio").addFilter(lambda record: "was never retrieved" not in record.getMessage())
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)), (jax.Array, handlers.ArrayHandler())
    )
    how = {"use_ocdbt": False, "use_compression": False, "type_handler_registry": registry}
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**how))
