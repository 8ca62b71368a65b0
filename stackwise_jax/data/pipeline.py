"""From documents to batches: datasets of equally long sequences, and a stream over them that resumes exactly.

Legend: N sequences of the dataset, B batch, T sequence length.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from stackwise_jax.config.schema import DataConfig
from stackwise_jax.data.packing import chunk, pack
from stackwise_jax.data.sources import read_documents, shuffled, split_documents
from stackwise_jax.data.tokenizers import Tokenizer
from stackwise_jax.errors import UsageError
from stackwise_jax.objectives.batch import Examples

log = logging.getLogger(__name__)

_ENDLESS = 2**60  # batches in the stream


@dataclass(frozen=True, eq=False)
class Dataset:
    """Text as sequences of equal length.

    Each document begins with the token bos, so that its first token is predicted, and ends with the token eos, so that
    its end is.

    Attributes:
        tokens_NT, segment_ids_NT, positions_NT: int32, as in `objectives.batch.Examples`.
        n_bytes: UTF-8 bytes of the documents; what separates documents in a file is not counted.
        fingerprint: equal for equal content.
    """

    tokens_NT: np.ndarray
    segment_ids_NT: np.ndarray
    positions_NT: np.ndarray
    n_bytes: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tokens_NT)


def training_texts(cfg: DataConfig, seed: int) -> Iterable[str]:
    """The documents for training (none that is held out), for training a tokenizer.

    Raises:
        UsageError: as `load_datasets`.
    """
    return split_documents(cfg, seed)[0]


def load_datasets(cfg: DataConfig, tokenizer: Tokenizer, seed: int) -> tuple[Dataset, Dataset]:
    """The training text and the held-out text, which share no document.

    Raises:
        UsageError: a key of the section data or a file that it names is wrong, or the training text is shorter than
            one sequence.
    """
    train_texts, valid_texts = split_documents(cfg, seed)
    warn_of_duplicates(train_texts, valid_texts)
    train, valid = build_dataset(train_texts, cfg, tokenizer), build_dataset(valid_texts, cfg, tokenizer)
    n_tokens = int((train.segment_ids_NT > 0).sum())
    if n_tokens < cfg.seq_len:
        where = f"data.path {cfg.path}" if cfg.path else f"data.source {cfg.source}"
        raise UsageError(
            f"{where} gives {n_tokens} tokens to train on, less than one sequence of data.seq_len {cfg.seq_len}; "
            f"write data.seq_len {n_tokens} at most or give more text"
        )
    return train, valid


def warn_of_duplicates(train: Iterable[str], valid: Sequence[str]) -> None:
    """Held-out text that was trained on measures memory; say in one line how much of it there is."""
    known = set(valid).intersection(train)
    if known:
        share = sum(len(text) for text in valid if text in known) / sum(map(len, valid))
        log.warning(
            "%.3g %% of the held-out text stands in the training text too, document for document, so its loss is too "
            "low; name another text, or remove the duplicates",
            100 * share,
        )


def load_text_dataset(path: str | Path, cfg: DataConfig, tokenizer: Tokenizer, *, known: Iterable[str] = ()) -> Dataset:
    """A file or folder of one's own, all of it, cut as `cfg` says; a text of any length that is not empty will do.

    Args:
        known: documents that a model was trained on; if the text holds some of them, a line says so.

    Raises:
        UsageError: there is no such file, or it holds no text.
    """
    texts = read_documents(path, cfg, key="data.path")
    warn_of_duplicates(known, texts)
    return build_dataset(texts, cfg, tokenizer)


def build_dataset(texts: Iterable[str], cfg: DataConfig, tokenizer: Tokenizer) -> Dataset:
    """Encode each document between bos and eos, and cut the documents into sequences as `data.packing` says.

    Where bos and eos are the same token, the end of a document is the beginning of the next one in a stream of chunks.
    """
    bos, eos = (np.array([id_], np.int32) for id_ in (tokenizer.bos_id, tokenizer.eos_id))
    n_bytes, documents = 0, []
    begun_by_end = cfg.packing == "chunk" and tokenizer.bos_id == tokenizer.eos_id
    for text in texts:
        n_bytes += len(text.encode())
        first = [] if begun_by_end and documents else [bos]
        documents.append(np.concatenate([*first, tokenizer.encode(text), eos]))
    cut = pack if cfg.packing == "pack" else chunk
    arrays = cut(documents, cfg.seq_len, tokenizer.pad_id)
    digest = hashlib.sha256(f"{arrays[0].shape} {n_bytes} {tokenizer.fingerprint}".encode())
    for array in arrays:
        digest.update(array.data)
    return Dataset(*arrays, n_bytes=n_bytes, fingerprint=digest.hexdigest())


class Loader:
    """An endless stream of batches; everything in it is a function of (dataset, batch_size, seed, fixed, i).

    An epoch is every sequence once: they are shuffled and cut into batches, whose order is shuffled too; those that
    fill no batch come last. By default each epoch is cut in its own way, and a batch that one epoch leaves open is
    filled by the next, with other sequences where there are enough. With `fixed` the batches are made of the same
    sequences in every epoch and only their order changes, so that what was computed for a batch serves whenever it
    returns; repeats without weight fill the last one. The first epoch is the same in both.

    Args:
        batch_size: sequences per batch.
        shuffle: False: sequences and batches come in the order of the text.
        fixed: whether batches are made of the same sequences in every epoch.

    Raises:
        UsageError: the dataset does not fill one batch.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, shuffle: bool = True, *, fixed: bool = False):
        n, seq_len = dataset.tokens_NT.shape
        if batch_size < 1:
            raise UsageError(f"data.batch_size is {batch_size}; write at least 1")
        if n < batch_size:
            raise UsageError(
                f"data.batch_size {batch_size} is more than the {n} sequences that the text gives at data.seq_len "
                f"{seq_len}; write data.batch_size {n} at most, a smaller data.seq_len, or give more text"
            )
        self.dataset, self.batch_size, self.seed, self.shuffle, self.fixed = dataset, batch_size, seed, shuffle, fixed
        self.n_batches = -(-n // batch_size)  # of an epoch; the last may be a part of one
        self._cut = lru_cache(maxsize=2)(self._draw_cut)
        self._order = lru_cache(maxsize=2)(self._draw_order)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def batch(self, i: int) -> Examples:
        """Step i of the stream, in numpy arrays of its own."""
        if self.fixed:
            return self.examples(self.batch_id(i))
        steps = (divmod(step, len(self.dataset)) for step in range(i * self.batch_size, (i + 1) * self.batch_size))
        return self._examples(np.array([self._epoch(epoch)[place] for epoch, place in steps]))

    def batch_id(self, i: int) -> int:
        """Which of the batches 0..n_batches-1 comes at step i, where they are `fixed`."""
        epoch, place = divmod(i, self.n_batches)
        order = self._order(epoch)
        return int(order[place]) if place < len(order) else place

    def examples(self, batch_id: int) -> Examples:
        """The content of a batch, where they are `fixed`, in numpy arrays of its own."""
        assert self.fixed, "batches that are cut in another way in each epoch have no number"
        cut, places_B = self._cut(0), np.arange(batch_id * self.batch_size, (batch_id + 1) * self.batch_size)
        found = self._examples(cut[places_B % len(cut)])
        is_repeat_B = places_B >= len(cut)
        return found._replace(segment_ids_BT=np.where(is_repeat_B[:, None], np.int32(0), found.segment_ids_BT))

    def iterate(self, start: int = 0) -> Any:
        """An iterator over batch(start), batch(start + 1), ..., read ahead by a thread.

        Its get_state() is a small dict of plain values; set_state(state) on the iterator of an equal loader goes on
        exactly where the state was taken. close() ends the thread.
        """
        import grain

        steps = grain.MapDataset.range(_ENDLESS).map(self.batch)
        iterator = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
        grain.experimental.set_next_index(iterator, start)
        return iterator

    def _draw_cut(self, epoch: int) -> np.ndarray:
        """The sequences in the order in which an epoch cuts them into batches."""
        n = len(self.dataset)
        return shuffled(n, self.seed, 0, *([epoch] if epoch else [])) if self.shuffle else np.arange(n)

    def _draw_order(self, epoch: int) -> np.ndarray:
        """The order of the full batches of an epoch."""
        n_full = len(self.dataset) // self.batch_size
        return shuffled(n_full, self.seed, 1, epoch) if self.shuffle else np.arange(n_full)

    def _draw(self, epoch: int) -> np.ndarray:
        """The sequences in the order of an epoch: its full batches, then those that fill none."""
        cut, order = self._cut(epoch), self._order(epoch)
        n_full = len(order) * self.batch_size
        return np.concatenate([cut[:n_full].reshape(-1, self.batch_size)[order].reshape(-1), cut[n_full:]])

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        """`_draw`, where those that fill up the batch that the epoch before left open are not in it already.

        They change places with sequences in the middle, so that how an epoch ends depends on that epoch alone.
        """
        rows, n_open = self._draw(epoch), epoch * len(self.dataset) % self.batch_size
        if self.shuffle and n_open:
            n_filling, n_last = self.batch_size - n_open, self.batch_size
            there = np.isin(rows, self._draw(epoch - 1)[-n_open:])
            twice = np.flatnonzero(there[:n_filling])
            free = n_filling + np.flatnonzero(~there[n_filling:-n_last])[: len(twice)]
            twice = twice[: len(free)]
            rows[twice], rows[free] = rows[free], rows[twice]
        return rows

    def _examples(self, rows_B: np.ndarray) -> Examples:
        data = self.dataset
        return Examples(
            data.tokens_NT[rows_B], data.segment_ids_NT[rows_B], data.positions_NT[rows_B], rows_B.astype(np.int32)
        )
