"""Text to tokens and back: bytes, or SentencePiece pieces trained on the training text or given as a file."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stackwise_jax.config.schema import TokenizerConfig
from stackwise_jax.errors import RunError, UsageError
from stackwise_jax.files import read_regular, write_atomically

TRAINING_CHARACTERS = 4_000_000  # SentencePiece is trained on about as many: every k-th slice of a larger text
_SLICE = 4096  # characters: longer documents are sliced, because the trainer leaves out overlong ones
_LEAST_PIECES = 5 + 256 + 1  # special tokens, bytes and the space
_SPACE = "\u2581"  # SentencePiece's sign for a space
_RECORD, _MODEL = "tokenizer.json", "tokenizer.model"


class Tokenizer(Protocol):
    """What the rest of the system asks of a tokenizer."""

    vocab_size: int
    special_ids: tuple[int, ...]  # ascending: pad, bos, eos, mask and all others that stand for no text
    unk_id: int | None  # stands for text that the tokenizer cannot spell; never sampled
    pad_id: int
    bos_id: int
    eos_id: int
    mask_id: int
    token_bytes: np.ndarray  # int32 (vocab_size,): bytes of the original text that each token stands for; specials 0
    fingerprint: str  # equal for tokenizers that give equal ids

    def encode(self, text: str) -> np.ndarray:
        """Token ids of the text, int32; no special token is added."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; special tokens and ids beyond the vocabulary are dropped, broken UTF-8 becomes U+FFFD."""
        ...

    def save(self, directory: Path) -> None:
        """Write what `load_tokenizer` needs to get the same tokenizer again."""
        ...


class ByteTokenizer:
    """One token per byte of UTF-8: byte b is id 4 + b, after the special tokens pad, bos, eos and mask (0 to 3)."""

    special_ids: tuple[int, ...] = (0, 1, 2, 3)
    pad_id, bos_id, eos_id, mask_id = special_ids
    unk_id: int | None = None
    first_byte = 4
    vocab_size = first_byte + 256

    def __init__(self):
        self.token_bytes = (np.arange(self.vocab_size) >= self.first_byte).astype(np.int32)
        self.fingerprint = hashlib.sha256(b"bytes: pad bos eos mask, then 256 bytes").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + self.first_byte

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        ids = ids[(ids >= self.first_byte) & (ids < self.vocab_size)]
        return (ids - self.first_byte).astype(np.uint8).tobytes().decode(errors="replace")

    def save(self, directory: Path) -> None:
        _save(directory, {"kind": "bytes", "fingerprint": self.fingerprint}, None)


class SentencePieceTokenizer:
    """A SentencePiece model. Special tokens that it lacks (pad, bos, eos, mask) get ids beyond its size.

    With a model from `train_sentencepiece`, decode(encode(text)) == text and token_bytes adds up to the bytes of the
    text, for any text. A model from elsewhere may normalise the text and have pieces for unknown text; such a piece
    counts no bytes, so that bits per byte is never flattered.

    Args:
        model: the content of a .model file.
        record: what `save` writes about where the model is from.

    Raises:
        RuntimeError: `model` is no SentencePiece model.
    """

    def __init__(self, model: bytes, record: dict[str, Any]):
        from sentencepiece import SentencePieceProcessor

        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._record = record
        self._pieces: Any = SentencePieceProcessor(model_proto=model)
        self.n_model = size = self._pieces.vocab_size()
        masks = [self._pieces.piece_to_id(piece) for piece in ("<mask>", "[MASK]")]
        masks = [i for i in masks if 0 <= i != self._pieces.unk_id()]  # an absent piece is given as unknown
        ids = [self._pieces.pad_id(), self._pieces.bos_id(), self._pieces.eos_id(), (*masks, -1)[0]]
        lacking = [i for i, id_ in enumerate(ids) if id_ < 0]
        for beyond, i in enumerate(lacking):
            ids[i] = size + beyond
        self.pad_id, self.bos_id, self.eos_id, self.mask_id = ids
        self.vocab_size = size + len(lacking)
        self._dropped = np.ones(self.vocab_size, bool)
        self._dropped[:size] = [self._pieces.is_control(i) for i in range(size)]
        self._dropped[ids] = True
        self.special_ids = tuple(np.flatnonzero(self._dropped).tolist())
        unknown = self._pieces.unk_id()
        self.unk_id = unknown if unknown >= 0 else None
        self.token_bytes = np.array([self._n_bytes(i) for i in range(self.vocab_size)], np.int32)
        # A real U+2581 in the text would come back as a space: it goes in as its three bytes.
        sign = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        adds_prefix = _SPACE in "".join(self._pieces.encode("a", out_type=str))
        self._sign = sign if all(map(self._pieces.is_byte, sign)) and not adds_prefix else None

    def _n_bytes(self, id_: int) -> int:
        if self._dropped[id_] or self._pieces.is_unknown(id_):
            return 0
        if self._pieces.is_byte(id_):
            return 1
        return len(self._pieces.id_to_piece(id_).replace(_SPACE, " ").encode())

    def encode(self, text: str) -> np.ndarray:
        if self._sign is None or _SPACE not in text:
            return np.array(self._pieces.encode(text), np.int32)
        first, *others = self._pieces.encode(text.split(_SPACE))
        return np.array(first + [id_ for part in others for id_ in self._sign + part], np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        ids = ids[(ids >= 0) & (ids < self.n_model)]
        return self._pieces.decode(ids[~self._dropped[ids]].tolist())

    def save(self, directory: Path) -> None:
        _save(directory, {**self._record, "fingerprint": self.fingerprint}, self.model)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a unigram model (Kudo 2018) with byte fallback and no normalisation; equal texts give an equal model.

    Documents are cut in slices of 4096 characters; of a text above TRAINING_CHARACTERS every k-th slice is used. The
    model may hold fewer pieces than asked for where the text does not hold as many.

    Returns:
        the content of a .model file with the special tokens pad, unk, bos, eos and mask as ids 0 to 4.

    Raises:
        UsageError: the text does not allow a vocabulary of this size.
    """
    from sentencepiece import SentencePieceTrainer

    slices = [text[i : i + _SLICE] for text in texts for i in range(0, len(text), _SLICE)]

    def too_small(reason: str) -> UsageError:
        return UsageError(
            f"tokenizer.vocab_size {vocab_size} does not suit the training text ({reason}); it must hold 5 special "
            "tokens, 256 bytes and the characters of the text: write more, or tokenizer.kind bytes"
        )

    if vocab_size < _LEAST_PIECES:
        raise too_small(f"less than {_LEAST_PIECES}")
    if not slices:
        raise UsageError("tokenizer.kind sentencepiece needs text to train on and there is none; see the section data")
    stride = -(-sum(map(len, slices)) // TRAINING_CHARACTERS) or 1
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=iter(slices[::stride]),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            control_symbols=["<mask>"],  # a control symbol is never found in text, a user-defined one would be
            byte_fallback=True,
            required_chars=_SPACE,  # else a space could fall back to the bytes of the sign, as a real U+2581 does
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=4 * _SLICE,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise too_small(str(error).rpartition("] ")[2].strip()) from error
    return model.getvalue()


def load_tokenizer(
    cfg: TokenizerConfig, texts: Callable[[], Iterable[str]] | None = None, saved: Path | None = None
) -> Tokenizer:
    """The tokenizer that was saved with a run if there is one, else the one that the configuration asks for.

    Args:
        texts: gives the training text, for kind sentencepiece.
        saved: folder that `Tokenizer.save` wrote or will write.

    Raises:
        UsageError: the saved tokenizer is not what `cfg` asks for, or a key or file of `cfg` is wrong.
        RunError: the saved tokenizer is damaged, or must be trained and there is no text.
    """
    if saved is not None and (saved / _RECORD).exists():
        return _load_saved(cfg, saved)
    if cfg.kind == "bytes":
        return ByteTokenizer()
    if cfg.kind == "file":
        model = _read_model(cfg)
        try:
            return SentencePieceTokenizer(model, {"kind": "file"})
        except (RuntimeError, UnicodeError) as error:  # the latter of pieces that are no UTF-8
            raise UsageError(
                f"tokenizer.path {cfg.path} is no SentencePiece model; write the path of a .model file"
            ) from error
    if texts is None:
        raise RunError(f"{saved or 'the run'} holds no tokenizer, and there is no text to train one on; train again")
    model = train_sentencepiece(texts(), cfg.vocab_size)
    return SentencePieceTokenizer(model, {"kind": "sentencepiece", "vocab_size": cfg.vocab_size})


def _read_model(cfg: TokenizerConfig) -> bytes:
    if not cfg.path:
        raise UsageError("tokenizer.kind file needs tokenizer.path; write the path of a SentencePiece .model file")
    try:
        model = read_regular(cfg.path)
    except OSError as error:
        raise UsageError(
            f"tokenizer.path {cfg.path} cannot be read ({error.strerror}); write the path of a .model file"
        ) from error
    if not model:
        raise UsageError(f"tokenizer.path {cfg.path} is empty; write the path of a SentencePiece .model file")
    return model


def _load_saved(cfg: TokenizerConfig, saved: Path) -> Tokenizer:
    try:
        record = json.loads(read_regular(saved / _RECORD, follow=False))
        kind, fingerprint = record["kind"], record["fingerprint"]
        if kind == "bytes":
            tokenizer = ByteTokenizer()
        else:
            model = read_regular(saved / _MODEL, follow=False)
            if hashlib.sha256(model).hexdigest() != fingerprint:
                raise ValueError("the model differs from its record")
            tokenizer = SentencePieceTokenizer(model, {k: v for k, v in record.items() if k != "fingerprint"})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # RuntimeError: also of deep nesting
        raise RunError(f"the tokenizer in {saved} is damaged ({error}); restore it or train again") from error
    if kind != cfg.kind:
        raise UsageError(
            f"{saved} was made with tokenizer.kind {kind} and {cfg.kind} is asked for; write {kind} or another run.dir"
        )
    if kind == "sentencepiece" and record.get("vocab_size") != cfg.vocab_size:
        raise UsageError(
            f"{saved} was made with tokenizer.vocab_size {record.get('vocab_size')} and {cfg.vocab_size} is asked for; "
            "write the former or another run.dir"
        )
    # The run keeps its own copy of a given model, so that the file may be gone; a file that is there must be the same.
    if kind == "file" and cfg.path and Path(cfg.path).exists() and _read_model(cfg) != model:
        raise UsageError(
            f"tokenizer.path {cfg.path} is not the model that the run in {saved.parent} was made with; "
            "restore that file or write another run.dir"
        )
    return tokenizer


def _save(directory: Path, record: dict[str, Any], model: bytes | None) -> None:
    """Write the model, then the record that makes it valid."""
    contents: Sequence[tuple[str, bytes | None]] = ((_MODEL, model), (_RECORD, json.dumps(record).encode()))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents:
            if content is not None:
                write_atomically(directory / name, content)
    except OSError as error:
        raise RunError(
            f"the tokenizer cannot be written to {directory} ({error.strerror}); make room or write another run.dir"
        ) from error
