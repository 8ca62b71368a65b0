"""Labelled TSV files: what is read, what is refused and where, and the batches made of it."""

import numpy as np
import pytest

from stackwise_jax.config.schema import TokenizerConfig
from stackwise_jax.data import (
    NO_LABEL,
    ByteTokenizer,
    LabelledLoader,
    LabelledTexts,
    encode_labelled,
    labelled_batches,
    load_tokenizer,
    read_labelled,
)
from stackwise_jax.errors import UsageError

LINES = ["good , very good\tpos", 'a "bad" one\tneg', "größer\u2028 2 \tpos"]


def write(path, lines, end="\n"):
    path.write_bytes(end.join([*lines, ""]).encode())
    return path


@pytest.fixture
def dataset():
    texts = tuple("x" * (i % 9) + str(i) for i in range(22))
    return encode_labelled(LabelledTexts(texts, tuple(i % 3 for i in range(22)), ("a", "b", "c")), ByteTokenizer(), 8)


# Files


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("label_first", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_both_orders_with_and_without_header_and_any_line_end(tmp_path, header, label_first, end):
    lines = ["sentence\tlabel"] * header + LINES
    if label_first:
        lines = ["\t".join(reversed(line.split("\t"))) for line in lines]
    data = read_labelled(write(tmp_path / "t.tsv", lines, end), header=header, label_first=label_first)
    assert data.texts == ("good , very good", 'a "bad" one', "größer\u2028 2 ")
    assert data.classes == ("neg", "pos") and data.labels == (1, 0, 1)


def test_last_line_needs_no_end_and_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes("\ufeffone\t1 \ntwo\t0".encode())
    assert read_labelled(path, header=False) == LabelledTexts(("one", "two"), (1, 0), ("0", "1"))


def test_classes_of_another_file_keep_their_order(tmp_path):
    path = write(tmp_path / "t.tsv", ["one\tb", "two\tb"])
    assert read_labelled(path, header=False, classes=["c", "b", "a"]).labels == (1, 1)
    assert read_labelled(path, header=False).classes == ("b",)


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (b"one\t1\nno tab\n", 2, "has 0 tabs"),
        (b"one\t1\n\ntwo\t1\t2\n", 3, "has 2 tabs"),
        (b"one\t1\n \t1\n", 2, "has no text"),
        (b"one\t\n", 1, "has no label"),
        (b"one\t1\ntwo\t2\n", 2, "'2' is none of ['0', '1']"),
        (b"one\t1\r\ntwo\t0\r\n\xe9\t1\r\n", 3, "is not UTF-8"),
        (b"\xef\xbb\xbf\xff\t1\n", 1, "is not UTF-8"),
        ("one\t1\n".encode("utf-16"), 1, "is not UTF-8 text but utf-16; convert it"),
        (b"one\t1\ntwo\x00\t1\n", 2, "is not UTF-8 text but a binary file"),
        (b"", 1, "no example"),
        (b"\n \n", 3, "no example"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path, content, line, said):
    path = tmp_path / "t.tsv"
    path.write_bytes(content)
    with pytest.raises(UsageError) as failure:
        read_labelled(path, header=False, classes=("0", "1"))
    sentence = str(failure.value)
    assert sentence.startswith(f"{path}, line {line}: ") and said in sentence and "\n" not in sentence


def test_header_alone_is_no_example_and_is_counted_as_a_line(tmp_path):
    with pytest.raises(UsageError, match="holds no example"):
        read_labelled(write(tmp_path / "t.tsv", ["sentence\tlabel"]), header=True)
    with pytest.raises(UsageError, match="line 2: has 0 tabs; write a label, one tab and a text"):
        read_labelled(write(tmp_path / "t.tsv", ["label\tsentence", "one"]), header=True, label_first=True)


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"t\.tsv cannot be read \(No such file"):
        read_labelled(tmp_path / "t.tsv", header=False)
    with pytest.raises(UsageError, match=r"/dev/zero cannot be read \(it is not a regular file"):
        read_labelled("/dev/zero", header=False)


# Sequences


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_texts_stand_behind_bos_padded_or_cut(kind):
    texts = ("a short one", "a much longer one that does not fit in the sequence at all, whatever the pieces are")
    tokenizer = load_tokenizer(TokenizerConfig(kind=kind, vocab_size=300), lambda: texts * 20)
    data = encode_labelled(LabelledTexts(texts, (1, 0), ("no", "yes")), tokenizer, 20)
    n = 1 + len(tokenizer.encode(texts[0]))
    assert n < 20
    assert (data.tokens_NT[:, 0] == tokenizer.bos_id).all()
    assert tokenizer.decode(data.tokens_NT[0]) == texts[0]
    assert texts[1].startswith(tokenizer.decode(data.tokens_NT[1]))
    assert data.segment_ids_NT.sum(axis=1).tolist() == [n, 20]
    assert (data.tokens_NT[0, n:] == tokenizer.pad_id).all() and not data.positions_NT[0, n:].any()
    assert data.positions_NT[1].tolist() == [*range(20)]
    assert data.labels_N.tolist() == [1, 0] and data.classes == ("no", "yes") and data.n_cut == 1
    assert {a.dtype for a in (data.tokens_NT, data.segment_ids_NT, data.positions_NT, data.labels_N)} == {
        np.dtype("i4")
    }


def test_a_sequence_has_room_for_text():
    with pytest.raises(UsageError, match=r"data\.seq_len is 1"):
        encode_labelled(LabelledTexts(("a",), (0,), ("x",)), ByteTokenizer(), 1)


# Batches


def test_stream_depends_on_the_seed_and_the_step_alone(dataset):
    loader, again = LabelledLoader(dataset, 5, seed=3), LabelledLoader(dataset, 5, seed=3)
    n = len(dataset)
    steps = [loader.batch(i) for i in range(3 * n)]
    for i in (11, 0, 7):
        for a, b in zip(again.batch(i).examples, steps[i].examples, strict=True):
            assert (a == b).all()
    assert n % 5  # an epoch ends within a batch
    ids = np.stack([step.examples.example_ids_B for step in steps]).reshape(15, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in ids.tolist())
    assert len({tuple(epoch) for epoch in ids.tolist()}) == 15
    assert (LabelledLoader(dataset, 5, seed=4).batch(0).examples.example_ids_B != ids[0, :5]).any()


def test_every_row_has_its_own_label(dataset):
    for batch in (LabelledLoader(dataset, 4, seed=0).batch(2), next(labelled_batches(dataset, 4))):
        rows = batch.examples.example_ids_B
        assert (batch.labels_B == rows % 3).all()
        assert (batch.examples.tokens_BT == dataset.tokens_NT[rows]).all()
        assert (batch.examples.segment_ids_BT == dataset.segment_ids_NT[rows]).all()
        assert (batch.examples.positions_BT == dataset.positions_NT[rows]).all()


def test_evaluation_sees_every_example_once_and_fills_up_with_padding(dataset):
    batches = list(labelled_batches(dataset, 8))
    labels = np.concatenate([batch.labels_B for batch in batches])
    assert labels.tolist() == [*dataset.labels_N.tolist(), NO_LABEL, NO_LABEL]
    filling = batches[-1].examples
    assert (filling.tokens_BT[-2:] == dataset.pad_id).all() and not filling.segment_ids_BT[-2:].any()
    assert (np.concatenate([b.examples.tokens_BT for b in batches])[:22] == dataset.tokens_NT).all()
    assert {array.dtype for array in (*filling, batches[-1].labels_B)} == {np.dtype("i4")}


def test_batches_hold_at_least_one_example_and_at_most_all(dataset):
    for size in (0, 23):
        with pytest.raises(UsageError, match=rf"data\.batch_size is {size}; write 1 to 22"):
            LabelledLoader(dataset, size, seed=0)
    with pytest.raises(UsageError, match=r"data\.batch_size is 0"):
        next(labelled_batches(dataset, 0))
