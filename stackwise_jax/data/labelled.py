"""Labelled texts: TSV files with a text and a label per line, as padded sequences and as batches.

Legend: N examples of the dataset, B batch, T sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stackwise_jax.data.sources import decode_text, shuffled
from stackwise_jax.data.tokenizers import Tokenizer
from stackwise_jax.errors import UsageError
from stackwise_jax.files import read_regular
from stackwise_jax.objectives.batch import Examples

NO_LABEL = -1  # of rows that only fill a batch


@dataclass(frozen=True)
class LabelledTexts:
    """What a file holds, in its order.

    Attributes:
        texts: one per example.
        labels: one per example, an index into `classes`.
        classes: names of the classes.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


def read_labelled(
    path: str | Path, *, header: bool, label_first: bool = False, classes: Sequence[str] | None = None
) -> LabelledTexts:
    """The examples of a UTF-8 file with two columns, which one tab separates.

    Nothing is quoted or escaped: a text can hold any character but tab and line feed. Blank lines are passed over, and
    so is white space around a label.

    Args:
        header: the first line names the columns and is no example.
        label_first: the label stands before the text and not behind it.
        classes: the labels that may occur, for files that belong to another; None: those of this file, sorted.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, holds no example, or a line is not as it should be or has a
            label that is none of `classes`. The sentence names the file and the line.
    """
    texts, labels = [], []
    number = 0
    for number, line in enumerate(_lines(Path(path)), start=1):
        if (header and number == 1) or not line.strip():
            continue
        text, label = _columns(line, f"{path}, line {number}", label_first)
        if classes is not None and label not in classes:
            raise UsageError(
                f"{path}, line {number}: the label {label!r} is none of {[*classes]}; write one of them, or say "
                "otherwise which column holds the label and whether there is a header"
            )
        texts.append(text)
        labels.append(label)
    if not texts:
        raise UsageError(
            f"{path}, line {number}: the file ends and holds no example; write a text and a label per line"
        )
    names = tuple(sorted(set(labels)) if classes is None else classes)
    index = {name: i for i, name in enumerate(names)}
    return LabelledTexts(tuple(texts), tuple(index[label] for label in labels), names)


def _lines(path: Path) -> list[str]:
    try:
        content = read_regular(path, limit=None)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); write the path of a file that can") from error
    newline = b"\n"
    text = decode_text(content, lambda byte: f"{path}, line {content.count(newline, 0, byte) + 1}:")
    return [line.removesuffix("\r") for line in text.split("\n")]


def _columns(line: str, where: str, label_first: bool) -> tuple[str, str]:
    """(text, label) of a line."""
    expected = "a label, one tab and a text" if label_first else "a text, one tab and a label"
    parts = line.split("\t")
    if len(parts) != 2:
        raise UsageError(f"{where}: has {len(parts) - 1} tabs; write {expected}")
    text, label = reversed(parts) if label_first else parts
    for what, value in (("text", text), ("label", label)):
        if not value.strip():
            raise UsageError(f"{where}: has no {what}; write {expected}")
    return text, label.strip()


@dataclass(frozen=True, eq=False)
class LabelledDataset:
    """Labelled texts as sequences of equal length. Each begins with the token bos, and its text is segment 1.

    Attributes:
        tokens_NT, segment_ids_NT, positions_NT: int32, as in `objectives.batch.Examples`.
        labels_N: int32, index into `classes`.
        classes: names of the classes.
        pad_id: of the tokenizer.
        n_cut: examples whose text is longer than a sequence; its end is cut off.
    """

    tokens_NT: np.ndarray
    segment_ids_NT: np.ndarray
    positions_NT: np.ndarray
    labels_N: np.ndarray
    classes: tuple[str, ...]
    pad_id: int
    n_cut: int

    def __len__(self) -> int:
        return len(self.tokens_NT)


def encode_labelled(data: LabelledTexts, tokenizer: Tokenizer, seq_len: int) -> LabelledDataset:
    """Encode each text with bos in front, and pad or cut it to seq_len tokens.

    Raises:
        UsageError: seq_len leaves no room for a token of the text.
    """
    if seq_len < 2:
        raise UsageError(f"data.seq_len is {seq_len}; write at least 2")
    tokens_NT = np.full((len(data.texts), seq_len), tokenizer.pad_id, np.int32)
    lengths_N = np.zeros(len(data.texts), np.int32)
    for i, text in enumerate(data.texts):
        ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode(text)])
        tokens_NT[i, : len(ids)] = ids[:seq_len]
        lengths_N[i] = len(ids)
    places_T = np.arange(seq_len, dtype=np.int32)
    segment_ids_NT = (places_T < lengths_N[:, None]).astype(np.int32)
    return LabelledDataset(
        tokens_NT,
        segment_ids_NT,
        places_T * segment_ids_NT,
        np.array(data.labels, np.int32),
        data.classes,
        tokenizer.pad_id,
        n_cut=int((lengths_N > seq_len).sum()),
    )


class LabelledBatch(NamedTuple):
    """Sequences and their labels; labels_B: int32 (B,), NO_LABEL in rows of padding that only fill the batch."""

    examples: Examples
    labels_B: np.ndarray


class LabelledLoader:
    """An endless stream of batches for training; step i is a function of (dataset, batch_size, seed, i) alone.

    All examples are shuffled for each epoch, and a batch that one epoch leaves open is filled by the next.

    Raises:
        UsageError: the dataset does not fill one batch.
    """

    def __init__(self, dataset: LabelledDataset, batch_size: int, seed: int):
        if not 1 <= batch_size <= len(dataset):
            raise UsageError(
                f"data.batch_size is {batch_size}; write 1 to {len(dataset)} (the examples that there are)"
            )
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self._order = lru_cache(maxsize=2)(lambda epoch: shuffled(len(dataset), seed, epoch))

    def batch(self, i: int) -> LabelledBatch:
        """Step i of the stream, in numpy arrays of its own."""
        steps = range(i * self.batch_size, (i + 1) * self.batch_size)
        places = (divmod(step, len(self.dataset)) for step in steps)
        return _batch(self.dataset, np.array([self._order(epoch)[place] for epoch, place in places]))


def labelled_batches(dataset: LabelledDataset, batch_size: int) -> Iterator[LabelledBatch]:
    """Every example once, in order, for evaluation; rows of padding fill up the last batch.

    Raises:
        UsageError: batch_size is below 1.
    """
    if batch_size < 1:
        raise UsageError(f"data.batch_size is {batch_size}; write at least 1")
    for start in range(0, len(dataset), batch_size):
        yield _batch(dataset, np.arange(start, start + batch_size))


def _batch(dataset: LabelledDataset, rows_B: np.ndarray) -> LabelledBatch:
    """The examples of these numbers; a number beyond the last gives a row of padding."""
    real_B = rows_B < len(dataset)
    kept_B = np.where(real_B, rows_B, 0)
    tokens_BT, ids_BT, positions_BT = (
        np.where(real_B[:, None], rows_NT[kept_B], np.int32(empty))
        for rows_NT, empty in (
            (dataset.tokens_NT, dataset.pad_id),
            (dataset.segment_ids_NT, 0),
            (dataset.positions_NT, 0),
        )
    )
    labels_B = np.where(real_B, dataset.labels_N[kept_B], np.int32(NO_LABEL))
    return LabelledBatch(Examples(tokens_BT, ids_BT, positions_BT, rows_B.astype(np.int32)), labels_B)
