"""The index of an OCDBT database, which is how version 0.1 wrote items: bounded before TensorStore decompresses it.

The index is a manifest and the nodes of a tree. Each of them lies anywhere in a file:

    magic (4 bytes) | length of the whole (8, little endian) | version 0 | 0: plain, 1: zstd | content | crc32c (4)

The values beside the nodes are never compressed, so their bytes are bounded by those of the files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from stackwise_jax.errors import RunError

INDEX = 2**26  # bytes; a node of version 0.1 has one block and an item a handful of nodes for each process
BLOCK = 2**17  # bytes, the most that a block of zstd decompresses to
_MAGIC = re.compile(rb"\x0c\xdb(?:\x3a\x2a|\x20\xde|\x12\x34)")  # a manifest, a node of the tree, one of old versions
_HEAD, _TAIL = 14, 4  # bytes of a node before and behind its content


def check_index(item: Path, sizes: Mapping[str, int]) -> None:
    """Refuse an index that may decompress to more than `INDEX` bytes.

    TensorStore bounds neither a node nor their sum. What it can take for a node begins with a magic number and a length
    that fits, so all of them are found without a walk through the tree; their blocks are counted, not decompressed.

    Args:
        sizes: the files of the item, relative to it, with their bytes.

    Raises:
        RunError: the index is larger, or a node is not as version 0.1 wrote it.
    """
    left = INDEX // BLOCK
    for name in (name for name, size in sizes.items() if size):
        content = np.memmap(item / name, np.uint8, "r")
        for found in _MAGIC.finditer(content.data):
            start = found.start()
            length = int.from_bytes(content[start + 4 : start + 12].tobytes(), "little")
            if not _HEAD + _TAIL <= length <= len(content) - start:
                continue  # a value that begins alike: TensorStore refuses a node of another length
            left -= _blocks(item / name, content[start : start + length], left)


def _blocks(file: Path, node: np.ndarray, limit: int) -> int:
    """The blocks of a compressed node, all of whose content has to be one zstd frame; 0 where it is plain."""
    how, content = node[12:_HEAD].tobytes(), memoryview(node.data)[_HEAD:-_TAIL]
    if how == b"\0\0":
        return 0
    if how != b"\0\1" or content[:4] != b"\x28\xb5\x2f\xfd" or len(content) < 5:
        raise RunError(f"{file} is damaged: a node of its index is not as version 0.1 wrote it")
    about = content[4]
    single = about >> 5 & 1  # the header has the size of the content and not that of the window
    at = 5 + (1 - single) + (0, 1, 2, 4)[about & 3] + (single, 2, 4, 8)[about >> 6]
    for count in range(1, limit + 1):
        block = int.from_bytes(content[at : at + 3], "little")
        last, kind, size = block & 1, block >> 1 & 3, block >> 3
        at += 3 + (1 if kind == 1 else size)  # kind 1: one byte that is repeated
        if size > BLOCK or at > len(content):
            break
        if last:
            if at + 4 * (about >> 2 & 1) != len(content):  # a checksum, if the header says so
                break
            return count
    else:
        raise RunError(f"{file} is damaged: the index of its item may have more than {INDEX:,} bytes, uncompressed")
    raise RunError(f"{file} is damaged: a node of its index is not as version 0.1 wrote it")
