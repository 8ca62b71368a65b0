"""Text to tokens and back, for bytes and SentencePiece, and the tokenizer kept in a run."""

import io
import os
import random

import numpy as np
import pytest

from stackwise_jax.config.schema import TokenizerConfig
from stackwise_jax.data import ByteTokenizer, SentencePieceTokenizer, load_tokenizer, tokenizers
from stackwise_jax.errors import RunError, UsageError

ODD_TEXTS = [
    "",
    "plain words\n\n  and lines \t\r\n",
    "é 漢字 \U0001f600 e\u0301 ﬁ \u2028 \ufeff",
    "▁a real ▁▁ sign▁ ▁",
    "<mask> <s></s> <pad> <unk> <0x41>",
    "\x00\x01\x7f",
    "    ",
]


def some_texts(n=200, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 8))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=20)) + ".\n" + rng.choice(words) for _ in range(n)]


@pytest.fixture(scope="module")
def trained():
    return load_tokenizer(TokenizerConfig(kind="sentencepiece", vocab_size=400), some_texts)


def foreign_model(**options):
    """A model made with the defaults of SentencePiece: it normalises, and has no pad, no mask and no bytes."""
    import sentencepiece

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(some_texts()),
        model_writer=buffer,
        vocab_size=100,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return buffer.getvalue()


@pytest.mark.parametrize("text", ODD_TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_round_trip_and_bytes_of_any_text(kind, text, trained):
    tokenizer = ByteTokenizer() if kind == "bytes" else trained
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not len(ids) or (not {*ids.tolist()} & {*tokenizer.special_ids} and ids.max() < tokenizer.vocab_size)


def test_random_unicode_round_trips(trained):
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xD800), 0x2581, 32])) for _ in range(30))
        assert trained.decode(trained.encode(text)) == text
        assert trained.token_bytes[trained.encode(text)].sum() == len(text.encode())


def test_trained_pieces_are_longer_than_bytes(trained):
    text = some_texts(1, seed=0)[0]
    assert len(trained.encode(text)) < 0.7 * len(text)


def test_byte_ids():
    tokenizer = ByteTokenizer()
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (0, 1, 2, 3)
    assert tokenizer.encode("A\x00").tolist() == [4 + 65, 4]
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == 260
    assert tokenizer.token_bytes.tolist() == [0] * 4 + [1] * 256


def test_specials_of_trained_model(trained):
    assert (trained.pad_id, trained.bos_id, trained.eos_id, trained.mask_id) == (0, 2, 3, 4)
    assert (trained.special_ids, trained.unk_id) == ((0, 2, 3, 4), 1)
    assert trained.token_bytes[:5].tolist() == [0] * 5
    assert trained.token_bytes.shape == (trained.vocab_size,)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_decode_drops_specials_and_strangers_and_mends_utf8(kind, trained):
    tokenizer = ByteTokenizer() if kind == "bytes" else trained
    ids = tokenizer.encode("ab").tolist()
    noisy = [tokenizer.bos_id, ids[0], tokenizer.pad_id, *ids[1:], tokenizer.mask_id, tokenizer.eos_id, 10_000, -1]
    assert tokenizer.decode(noisy) == "ab"
    half = tokenizer.encode("é")[:1] if kind == "bytes" else [trained._pieces.piece_to_id("<0xC3>")]
    assert tokenizer.decode(half) == "\ufffd"
    assert tokenizer.decode([]) == ""


def test_training_is_deterministic_and_uses_a_sample_of_a_large_text(monkeypatch, trained):
    cfg = TokenizerConfig(kind="sentencepiece", vocab_size=400)
    assert load_tokenizer(cfg, some_texts).fingerprint == trained.fingerprint
    monkeypatch.setattr(tokenizers, "TRAINING_CHARACTERS", 8000)
    sampled = load_tokenizer(cfg, some_texts)
    assert sampled.fingerprint != trained.fingerprint
    assert load_tokenizer(cfg, some_texts).fingerprint == sampled.fingerprint


def test_text_longer_than_the_trainer_takes_is_not_lost():
    one_line = ["".join(some_texts()).replace("\n", " ").replace("z", "")]
    assert len(one_line[0].encode()) > 4 * tokenizers._SLICE
    tokenizer = load_tokenizer(TokenizerConfig(kind="sentencepiece", vocab_size=400), lambda: one_line)
    assert tokenizer.vocab_size > 350


def test_small_text_gives_fewer_pieces_than_asked_for():
    tokenizer = load_tokenizer(TokenizerConfig(kind="sentencepiece", vocab_size=4096), lambda: ["hello hello"])
    assert 262 <= tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode("▁ x y")) == "▁ x y"


def test_given_model_without_specials_gets_them_beyond_its_size(tmp_path):
    path = tmp_path / "m.model"
    path.write_bytes(foreign_model())
    tokenizer = load_tokenizer(TokenizerConfig(kind="file", path=str(path)))
    n = tokenizer.n_model
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.vocab_size) == (n, n + 1, n + 2)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    assert tokenizer.special_ids == (1, 2, tokenizer.pad_id, tokenizer.mask_id)
    text = some_texts(1)[0].replace("\n", " ")
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.mask_id, tokenizer.pad_id]) == text
    unknown = tokenizer.encode("漢")
    assert tokenizer.token_bytes[unknown].sum() <= 1  # the space that this model puts in front, nothing for unknown


def test_given_model_keeps_its_mask():
    model = foreign_model(pad_id=3, user_defined_symbols=["[MASK]"])
    tokenizer = SentencePieceTokenizer(model, {"kind": "file"})
    assert (tokenizer.mask_id, tokenizer.pad_id) == (4, 3)
    assert tokenizer.vocab_size == tokenizer.n_model
    assert tokenizer.decode([tokenizer.mask_id]) == ""


def test_saved_tokenizer_is_used_instead_of_training(tmp_path, trained):
    trained.save(tmp_path / "tokenizer")
    cfg = TokenizerConfig(kind="sentencepiece", vocab_size=400)
    again = load_tokenizer(cfg, None, tmp_path / "tokenizer")
    assert again.fingerprint == trained.fingerprint
    assert again.encode("some text").tolist() == trained.encode("some text").tolist()


def test_saved_file_model_outlives_the_file_and_refuses_another(tmp_path):
    path, saved = tmp_path / "m.model", tmp_path / "run" / "tokenizer"
    path.write_bytes(foreign_model())
    cfg = TokenizerConfig(kind="file", path=str(path))
    tokenizer = load_tokenizer(cfg, None, saved)
    tokenizer.save(saved)
    path.unlink()
    assert load_tokenizer(cfg, None, saved).fingerprint == tokenizer.fingerprint
    path.write_bytes(foreign_model(model_type="bpe"))
    with pytest.raises(UsageError, match=r"tokenizer.path .*m.model is not the model"):
        load_tokenizer(cfg, None, saved)


def test_saved_tokenizer_that_does_not_fit_is_refused(tmp_path, trained):
    trained.save(tmp_path)
    with pytest.raises(UsageError, match=r"tokenizer.kind sentencepiece and bytes is asked for"):
        load_tokenizer(TokenizerConfig(), None, tmp_path)
    with pytest.raises(UsageError, match=r"tokenizer.vocab_size 400 and 500 is asked for"):
        load_tokenizer(TokenizerConfig(kind="sentencepiece", vocab_size=500), None, tmp_path)


@pytest.mark.parametrize("damage", ["model", "record", "missing"])
def test_damaged_saved_tokenizer(tmp_path, trained, damage):
    trained.save(tmp_path)
    model, record = tmp_path / "tokenizer.model", tmp_path / "tokenizer.json"
    if damage == "model":
        model.write_bytes(model.read_bytes()[:-10])
    elif damage == "record":
        record.write_text(record.read_text()[:-5])
    else:
        model.unlink()
    with pytest.raises(RunError, match=r"the tokenizer in .* is damaged"):
        load_tokenizer(TokenizerConfig(kind="sentencepiece", vocab_size=400), some_texts, tmp_path)


RECORDS = {
    "a list": "[1]",
    "a number": "3",
    "nothing": "",
    "deep": "[" * 100_000,
    "no kind": '{"fingerprint": "x"}',
    "a kind that is none": '{"kind": {"a": 1}, "fingerprint": "x"}',
    "a fingerprint that is none": '{"kind": "sentencepiece", "fingerprint": null}',
    "no UTF-8": b"\xff\xfe\x00",
    "too long a number": '{"kind": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_with_wrong_fields_is_damaged(tmp_path, trained, case):
    trained.save(tmp_path)
    text = RECORDS[case]
    (tmp_path / "tokenizer.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RunError, match=r"the tokenizer in .* is damaged \("):
        load_tokenizer(TokenizerConfig(kind="sentencepiece", vocab_size=400), some_texts, tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("what", ["pipe", "link", "too large"])
def test_a_saved_tokenizer_is_regular_files_of_bounded_size(tmp_path, trained, name, what):
    trained.save(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.touch()
        os.truncate(path, 2**40)
    with pytest.raises(RunError, match=r"the tokenizer in .* is damaged"):
        load_tokenizer(TokenizerConfig(kind="sentencepiece", vocab_size=400), some_texts, tmp_path)


def test_saving_replaces_a_link_and_does_not_follow_it(tmp_path, trained):
    (tmp_path / "outside").write_text("mine")
    for name in ("tokenizer.json", "tokenizer.json.tmp", "tokenizer.model.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "outside")
    trained.save(tmp_path)
    assert (tmp_path / "outside").read_text() == "mine"
    load_tokenizer(TokenizerConfig(kind="sentencepiece", vocab_size=400), None, tmp_path)


def proto(*pieces: tuple[bytes, int]) -> bytes:
    """A SentencePiece model with these (piece, type) entries and nothing else."""
    entries = (
        b"\x0a" + bytes([len(piece)]) + piece + b"\x15\0\0\x80\xbf\x18" + bytes([kind]) for piece, kind in pieces
    )
    return b"".join(b"\x0a" + bytes([len(entry)]) + entry for entry in entries)


MODELS = {
    "one byte": b"\x0a",
    "no pieces": b"\x12\x00",
    "only the unknown piece": proto((b"<unk>", 2)),
    "no unknown piece": proto((b"a", 1)),
    "twice a piece": proto((b"<unk>", 2), (b"a", 1), (b"a", 1)),
    "no UTF-8": proto((b"<unk>", 2), (b"\xff\xfe", 1)),
    "random": random.Random(0).randbytes(5000),
}


@pytest.mark.parametrize("case", ["cut", *MODELS])
def test_a_damaged_model_is_a_sentence_and_nothing_else(tmp_path, trained, case, capfd):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained.model[: len(trained.model) // 2] if case == "cut" else MODELS[case])
    with pytest.raises(UsageError, match=r"tokenizer.path .*tokenizer.model is no SentencePiece model"):
        load_tokenizer(TokenizerConfig(kind="file", path=str(path)))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("path", ["/dev/zero", "folder", "pipe"])
def test_a_model_that_is_no_regular_file(tmp_path, path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"tokenizer.path .* cannot be read"):
        load_tokenizer(TokenizerConfig(kind="file", path=str(tmp_path / path)))


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        ByteTokenizer().save(tmp_path / "file" / "tokenizer")


def test_bad_requests(tmp_path):
    garbage, empty = tmp_path / "garbage.model", tmp_path / "empty.model"
    garbage.write_bytes(b"this is no model" * 9)
    empty.write_bytes(b"")
    with pytest.raises(UsageError, match=r"tokenizer.kind file needs tokenizer.path"):
        load_tokenizer(TokenizerConfig(kind="file"))
    with pytest.raises(UsageError, match=r"tokenizer.path .*absent.model cannot be read \(No such file"):
        load_tokenizer(TokenizerConfig(kind="file", path=str(tmp_path / "absent.model")))
    with pytest.raises(UsageError, match=r"tokenizer.path .*garbage.model is no SentencePiece model"):
        load_tokenizer(TokenizerConfig(kind="file", path=str(garbage)))
    with pytest.raises(UsageError, match=r"tokenizer.path .*empty.model is empty"):
        load_tokenizer(TokenizerConfig(kind="file", path=str(empty)))
    for size in (-1, 100, 265):
        with pytest.raises(UsageError, match=rf"tokenizer.vocab_size {size} does not suit the training text"):
            load_tokenizer(TokenizerConfig(kind="sentencepiece", vocab_size=size), some_texts)
    with pytest.raises(UsageError, match=r"needs text to train on"):
        load_tokenizer(TokenizerConfig(kind="sentencepiece"), lambda: [])
    with pytest.raises(RunError, match="holds no tokenizer"):
        load_tokenizer(TokenizerConfig(kind="sentencepiece"), None, tmp_path / "absent")
