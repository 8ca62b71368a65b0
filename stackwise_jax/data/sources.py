"""Where the documents come from: files, folders, JSONL or the built-in sources; and which of them are held out."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stackwise_jax.config.schema import DataConfig
from stackwise_jax.data.builtin import markov_documents, python_docs
from stackwise_jax.errors import UsageError
from stackwise_jax.files import read_regular

_MARKS = (  # with which a text in another encoding begins; the longer ones first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BLANK_LINES = re.compile(r"\r?\n(?:[ \t]*\r?\n)+")


def shuffled(n: int, *key: int) -> np.ndarray:
    """A permutation of 0..n-1 that depends on the integers in `key` alone, the same for every version of numpy."""
    bits = np.random.Philox(np.random.SeedSequence([k % 2**63 for k in key])).random_raw(n)
    return np.argsort(bits, kind="stable")


def split_documents(cfg: DataConfig, seed: int) -> tuple[list[str], list[str]]:
    """The documents for training and those held out, each in the order of the source.

    Held out are those of `data.valid_path`; without it, `valid_fraction` of the documents (at least one), drawn by
    `seed`; of the synthetic source, a sample of its own.

    Raises:
        UsageError: a key or a file is wrong; the sentence names it.
    """
    _check(cfg)
    if cfg.source == "synthetic":
        train = markov_documents(cfg.synthetic_tokens, seed, part=0)
    elif cfg.source == "python-docs":
        train = list(python_docs())
    else:
        assert cfg.path is not None
        train = read_documents(cfg.path, cfg, key="data.path")
    if cfg.valid_path is not None:
        return train, read_documents(cfg.valid_path, cfg, key="data.valid_path")
    if cfg.source == "synthetic":
        return train, markov_documents(max(1, round(cfg.valid_fraction * cfg.synthetic_tokens)), seed, part=1)
    if len(train) < 2:
        raise UsageError(
            f"data.path {cfg.path} is a single document, so none can be held out; separate documents by blank lines "
            "or give a held-out text in data.valid_path"
        )
    n_valid = min(max(1, round(cfg.valid_fraction * len(train))), len(train) - 1)
    held_out = set(shuffled(len(train), seed)[:n_valid].tolist())
    parts: tuple[list[str], list[str]] = [], []
    for i, document in enumerate(train):
        parts[i in held_out].append(document)
    return parts


def _check(cfg: DataConfig) -> None:
    if cfg.source in ("text", "jsonl") and not cfg.path:
        raise UsageError(f"data.source {cfg.source} needs data.path; write the path of a file or a folder")
    if cfg.source not in ("text", "jsonl") and cfg.path:
        raise UsageError(
            f"data.path {cfg.path} is given but data.source {cfg.source} reads no file; write data.source text or jsonl"
        )
    if cfg.valid_path is None and not 0 < cfg.valid_fraction < 1:
        raise UsageError(
            f"data.valid_fraction is {cfg.valid_fraction}; write a share between 0 and 1, or give data.valid_path"
        )
    if cfg.seq_len < 2:
        raise UsageError(f"data.seq_len is {cfg.seq_len}; write at least 2")
    if cfg.source == "synthetic" and cfg.synthetic_tokens < 1:
        raise UsageError(f"data.synthetic_tokens is {cfg.synthetic_tokens}; write at least 1")


def read_documents(path: str | Path, cfg: DataConfig, key: str) -> list[str]:
    """The documents of a file, or of the files in a folder and the folders in it, sorted by path.

    A name that ends in .jsonl or .txt says what a file is, else `data.source` does. JSONL: each line is an object whose
    `data.text_key` is one document. Text: see `text_documents`. What holds only white space is no document.

    Args:
        key: the configuration key that named the path, for messages.

    Raises:
        UsageError: no such path, nothing in it, not UTF-8, or a line that is not as it should be.
    """
    if not str(path):
        raise UsageError(f"{key} is empty; write the path of a file or a folder")
    path = Path(path)
    is_jsonl = path.suffix == ".jsonl" or (cfg.source == "jsonl" and path.suffix != ".txt")
    files = _files(path, ".jsonl" if is_jsonl else ".txt", key)
    documents = []
    for file in files:
        text = _read(file, key)
        documents += _jsonl_documents(text, file, cfg.text_key) if is_jsonl else text_documents(text)
    if not documents:
        raise UsageError(f"{key} {path} holds no text; write the path of a file that does")
    return documents


def _files(path: Path, suffix: str, key: str) -> list[Path]:
    """The file at a path, or the files with this suffix in the folder there and the folders in it.

    A folder or a file that cannot be read is refused: passed over in silence it would be lost text. Links to folders
    are not followed, for they may lead in circles.
    """

    def refuse(error: OSError) -> None:
        raise _unreadable(key, error.filename, error)

    try:
        is_folder = path.is_dir()
        if not is_folder and not path.exists():
            raise UsageError(f"{key} {path} does not exist; write the path of a file or a folder that does")
    except OSError as error:  # a name that is too long, a folder on the way without rights
        raise _unreadable(key, path, error) from error
    if not is_folder:
        return [path]
    names = ((folder, name) for folder, _, names in os.walk(path, onerror=refuse) for name in names)
    files = sorted(Path(folder) / name for folder, name in names if name.endswith(suffix))
    if not files:
        raise UsageError(f"{key} {path} is a folder without a {suffix} file; name a folder that holds some")
    return files


def _unreadable(key: str, file: Path | str, error: OSError) -> UsageError:
    why = (error.strerror or type(error).__name__).removeprefix("it ")
    return UsageError(f"{key}: {file} cannot be read ({why}); check the file and its rights")


def decode_text(content: bytes, place: Callable[[int], str]) -> str:
    """The text of a file in UTF-8, with or without a mark at its beginning.

    Args:
        place: what a message says before "is not UTF-8 text" about the byte of this number.

    Raises:
        UsageError: it is in another encoding, or no text.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            raise UsageError(f"{place(0)} is not UTF-8 text but {encoding}; {_conversion(encoding)}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if 0 <= (zero := content.find(0)) < error.start:
            raise _binary(content, zero, place) from error
        raise UsageError(
            f"{place(error.start)} is not UTF-8 text (byte {error.start}); {_conversion('latin1')}"
        ) from error
    if (zero := content.find(0)) >= 0:
        raise _binary(content, zero, place)
    return text


def _binary(content: bytes, zero: int, place: Callable[[int], str]) -> UsageError:
    """What is wrong with a file that holds a zero byte."""
    begin = content[:4096]
    for first, encoding in ((1, "utf-16le"), (0, "utf-16be")):
        if 4 * begin[first::2].count(0) > len(begin):  # every other byte, in most of the text
            return UsageError(f"{place(0)} is not UTF-8 text but {encoding}; {_conversion(encoding)}")
    return UsageError(
        f"{place(zero)} is not UTF-8 text but a binary file (byte {zero} is zero); write the path of a text file"
    )


def _conversion(encoding: str) -> str:
    return f"convert it, for instance with iconv -f {encoding} -t utf-8"


def text_documents(text: str) -> list[str]:
    """The documents of a text: the paragraphs between blank lines if there are several, else the lines."""
    parts = [part for part in _BLANK_LINES.split(text) if part.strip()]
    if len(parts) < 2:
        parts = [line for line in re.split(r"\r?\n", text) if line.strip()]
    return [part.strip("\r\n") for part in parts]


def _read(file: Path, key: str) -> str:
    try:
        content = read_regular(file, limit=None)
    except OSError as error:
        raise _unreadable(key, file, error) from error
    return decode_text(content, lambda byte: f"{key}: {file}")


def _jsonl_documents(text: str, file: Path, text_key: str) -> list[str]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if sum(name == text_key for name, _ in pairs) > 1:
            raise ValueError(f"the key {text_key!r} stands twice")
        return dict(pairs)

    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            # Whole numbers of any length may stand beside the text; Python refuses those of more than 4,300 digits.
            record = json.loads(line, parse_int=float, object_pairs_hook=once)
        except RecursionError:
            raise UsageError(f"{where}: is nested too deeply; write one object with the text per line") from None
        except ValueError as error:
            raise UsageError(f"{where}: is no JSON ({error}); write one object per line") from error
        if not isinstance(record, dict) or text_key not in record:
            raise UsageError(f"{where}: has no key {text_key!r}; write an object with it, or change data.text_key")
        document = record[text_key]
        if not isinstance(document, str):
            raise UsageError(f"{where}: {text_key!r} is no string; write the text as a string")
        if any("\ud800" <= c <= "\udfff" for c in document):
            raise UsageError(f"{where}: {text_key!r} holds half of a surrogate pair; write complete characters")
        if document.strip():
            documents.append(document)
    return documents
