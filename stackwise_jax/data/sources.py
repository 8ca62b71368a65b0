"""Where the documents come from: files, folders, JSONL or the built-in sources; and which of them are held out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from stackwise_jax.config.schema import DataConfig
from stackwise_jax.data.builtin import markov_documents, python_docs
from stackwise_jax.errors import UsageError

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
    path = Path(path)
    is_jsonl = path.suffix == ".jsonl" or (cfg.source == "jsonl" and path.suffix != ".txt")
    suffix = ".jsonl" if is_jsonl else ".txt"
    if path.is_dir():
        files = sorted(p for p in path.rglob(f"*{suffix}") if p.is_file())
        if not files:
            raise UsageError(f"{key} {path} is a folder without a {suffix} file; name a folder that holds some")
    elif path.exists():
        files = [path]
    else:
        raise UsageError(f"{key} {path} does not exist; write the path of a file or a folder that does")
    documents = []
    for file in files:
        text = _read(file, key)
        documents += _jsonl_documents(text, file, cfg.text_key) if is_jsonl else text_documents(text)
    if not documents:
        raise UsageError(f"{key} {path} holds no text; write the path of a file that does")
    return documents


def text_documents(text: str) -> list[str]:
    """The documents of a text: the paragraphs between blank lines if there are several, else the lines."""
    parts = [part for part in _BLANK_LINES.split(text) if part.strip()]
    if len(parts) < 2:
        parts = [line for line in re.split(r"\r?\n", text) if line.strip()]
    return [part.strip("\r\n") for part in parts]


def _read(file: Path, key: str) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{key}: {file} cannot be read ({error.strerror}); check the file and its rights") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{key}: {file} is not UTF-8 text (byte {error.start}); convert it, for instance with "
            "iconv -f latin1 -t utf-8"
        ) from error


def _jsonl_documents(text: str, file: Path, text_key: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
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
