"""From documents to batches: datasets of equally long sequences, and a stream over them that resumes exactly.

Legend: N sequences of the dataset, B batch, T sequence length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
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

_ENDLESS = 2**60  # batches in the stream


@dataclass(frozen=True, eq=False)
class Dataset:
    """Text as sequences of equal length. Each document begins with the token bos, so that its first byte is predicted.

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
    train, valid = build_dataset(train_texts, cfg, tokenizer), build_dataset(valid_texts, cfg, tokenizer)
    n_tokens = int((train.segment_ids_NT > 0).sum())
    if n_tokens < cfg.seq_len:
        where = f"data.path {cfg.path}" if cfg.path else f"data.source {cfg.source}"
        raise UsageError(
            f"{where} gives {n_tokens} tokens to train on, less than one sequence of data.seq_len {cfg.seq_len}; "
            f"write data.seq_len {n_tokens} at most or give more text"
        )
    return train, valid


def load_text_dataset(path: str | Path, cfg: DataConfig, tokenizer: Tokenizer) -> Dataset:
    """A file or folder of one's own, all of it, cut as `cfg` says; a text of any length that is not empty will do.

    Raises:
        UsageError: there is no such file, or it holds no text.
    """
    return build_dataset(read_documents(path, cfg, key="data.path"), cfg, tokenizer)


def build_dataset(texts: Iterable[str], cfg: DataConfig, tokenizer: Tokenizer) -> Dataset:
    """Encode each document with bos in front, and cut the documents into sequences as `data.packing` says."""
    bos = np.array([tokenizer.bos_id], np.int32)
    n_bytes, documents = 0, []
    for text in texts:
        n_bytes += len(text.encode())
        documents.append(np.concatenate([bos, tokenizer.encode(text)]))
    cut = pack if cfg.packing == "pack" else chunk
    arrays = cut(documents, cfg.seq_len, tokenizer.pad_id)
    digest = hashlib.sha256(f"{arrays[0].shape} {n_bytes} {tokenizer.fingerprint}".encode())
    for array in arrays:
        digest.update(array.data)
    return Dataset(*arrays, n_bytes=n_bytes, fingerprint=digest.hexdigest())


class Loader:
    """An endless stream of batches; everything in it is a function of (dataset, batch_size, seed, i).

    The sequences are shuffled once and cut into batches whose composition never changes, so that what was computed for
    a batch serves whenever it returns; the few sequences that fill no batch are left out. The order of the batches is
    drawn anew for each epoch.

    Args:
        batch_size: sequences per batch.
        shuffle: False: sequences and batches come in the order of the text.

    Raises:
        UsageError: the dataset does not fill one batch.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, shuffle: bool = True):
        n, seq_len = dataset.tokens_NT.shape
        if batch_size < 1:
            raise UsageError(f"data.batch_size is {batch_size}; write at least 1")
        if n < batch_size:
            raise UsageError(
                f"data.batch_size {batch_size} is more than the {n} sequences that the text gives at data.seq_len "
                f"{seq_len}; write data.batch_size {n} at most, a smaller data.seq_len, or give more text"
            )
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch_size, seed, shuffle
        self.n_batches = n // batch_size
        order = shuffled(n, seed, 0) if shuffle else np.arange(n)
        self._rows = order[: self.n_batches * batch_size].reshape(-1, batch_size)
        self._epoch_order = lru_cache(maxsize=2)(self._draw_epoch_order)

    def _draw_epoch_order(self, epoch: int) -> np.ndarray:
        return shuffled(self.n_batches, self.seed, 1, epoch) if self.shuffle else np.arange(self.n_batches)

    def batch_id(self, i: int) -> int:
        """Which of the batches 0..n_batches-1 comes at step i of the stream."""
        epoch, place = divmod(i, self.n_batches)
        return int(self._epoch_order(epoch)[place])

    def examples(self, batch_id: int) -> Examples:
        """The content of a batch, in numpy arrays of its own."""
        rows_B, data = self._rows[batch_id], self.dataset
        return Examples(
            data.tokens_NT[rows_B], data.segment_ids_NT[rows_B], data.positions_NT[rows_B], rows_B.astype(np.int32)
        )

    def batch(self, i: int) -> tuple[int, Examples]:
        """Step i of the stream: the id of its batch, and the batch."""
        batch_id = self.batch_id(i)
        return batch_id, self.examples(batch_id)

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
