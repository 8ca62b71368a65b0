"""Text that needs no file: Python's own documentation, and a Markov source whose entropy is known."""

from __future__ import annotations

import ast
import gc
import math
import os
import string
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

from stackwise_jax.errors import UsageError

# Parts of the standard library that distributions ship apart or leave out, and tests: without them the text is the
# same wherever the Python version is.
_LEFT_OUT = {"test", "tests", "tkinter", "idlelib", "lib2to3", "distutils", "turtledemo", "ensurepip", "venv"}
_LEFT_OUT |= {"pydoc_data", "site-packages", "dist-packages"}

SYMBOLS = string.ascii_letters + string.digits + "-_"  # of the Markov source: 64 printable characters
DOCUMENT_SYMBOLS = 4096  # length of a document of the Markov source
_JUMP = 0.05  # chance that the next symbol is drawn uniformly from all symbols


@lru_cache(maxsize=1)
def python_docs(root: Path | None = None) -> tuple[str, ...]:
    """The English text of Python's documentation: about 2 MB in some 500 documents.

    One document per topic of `pydoc_data.topics`, sorted by name, then one per module of the standard library, sorted
    by path: its docstrings in the order of the source. A docstring that occurs again is left out. The sources are
    parsed with `ast`; nothing is imported or run. Files that cannot be read or parsed are passed over.

    Args:
        root: folder of the standard library; None: that of the running Python.

    Raises:
        UsageError: the folder holds no documentation.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    documents = _topics(root / "pydoc_data" / "topics.py")
    seen: set[str] = set()
    with _no_garbage_collection():
        for path in _modules(root):
            tree = _parse(path)
            fresh = [doc for doc in dict.fromkeys(_docstrings(tree)) if doc not in seen] if tree else []
            seen.update(fresh)
            if fresh:
                documents.append("\n\n".join(fresh).encode(errors="replace").decode())  # no half surrogate pairs
    if not documents:
        raise UsageError(
            f"data.source python-docs reads the source files of the standard library, and {root} holds none; "
            "write data.source text and give a file of your own in data.path"
        )
    return tuple(documents)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees are freed without it, and its search through their many nodes nearly doubles the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _modules(root: Path) -> list[Path]:
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT and not name.startswith("config-")]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(paths, key=lambda path: path.relative_to(root).parts)


def _parse(path: Path) -> ast.Module | None:
    try:
        source = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a source must not decide what is read
            return ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module and of the classes and functions in it, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = (ast.get_docstring(node) or "").strip()
        if doc:
            yield doc
    for part in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, part, ()):
            if hasattr(child, "body"):
                yield from _docstrings(child)


def _topics(path: Path) -> list[str]:
    tree = _parse(path)
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            try:
                topics = ast.literal_eval(node.value)
            except (ValueError, TypeError):
                continue
            return [text for _, text in sorted(topics.items()) if isinstance(text, str) and text.strip()]
    return []


def markov_entropy() -> float:
    """Entropy rate of the Markov source in nats per symbol: 0.40 (a uniform guess costs ln 64 = 4.16)."""
    n = len(SYMBOLS)
    other = _JUMP / n
    follower = 1 - _JUMP + other
    return -follower * math.log(follower) - (n - 1) * other * math.log(other)


def markov_follower(symbol: int) -> int:
    """The symbol that mostly comes after: an affine map that visits all 64 before it returns."""
    return (37 * symbol + 11) % len(SYMBOLS)


def markov_documents(n_symbols: int, seed: int, part: int) -> list[str]:
    """Documents of an order-1 Markov source over 64 symbols, `n_symbols` in all.

    From each symbol the source goes to its follower, or with chance 0.05 to any of the 64. Each symbol has one
    follower and follows one, so all are equally frequent; a document starts with any. The source is always the same,
    `seed` and `part` (0: training, 1: held out) draw the sample.
    """
    n = len(SYMBOLS)
    ring = np.zeros(n, np.int64)  # the symbols in the order in which they follow one another
    for i in range(1, n):
        ring[i] = markov_follower(int(ring[i - 1]))
    rng = np.random.default_rng([seed % 2**63, part])
    length = min(DOCUMENT_SYMBOLS, n_symbols)
    time = np.arange(n_symbols)
    jumps = (rng.random(n_symbols) < _JUMP) | (time % length == 0)
    last_jump = np.maximum.accumulate(np.where(jumps, time, 0))
    place = rng.integers(n, size=n_symbols)[last_jump] + time - last_jump
    text = np.frombuffer(SYMBOLS.encode(), np.uint8)[ring[place % n]].tobytes().decode("ascii")
    return [text[i : i + length] for i in range(0, n_symbols, length)]
