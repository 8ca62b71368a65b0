"""Datasets and the stream of batches: complete, deterministic, and resumed exactly."""

import dataclasses
import json
import threading
from functools import partial

import jax
import numpy as np
import pytest

from stackwise_jax.config.schema import DataConfig, TokenizerConfig
from stackwise_jax.curriculum.phase import Noise, Objective
from stackwise_jax.data import ByteTokenizer, Loader, load_datasets, load_text_dataset, load_tokenizer, training_texts
from stackwise_jax.data.pipeline import build_dataset
from stackwise_jax.engine import vocab_of
from stackwise_jax.errors import UsageError
from stackwise_jax.objectives import Examples, example_keys, make_batch

T, B = 16, 4


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n\n".join(f"document {i} " + "x" * (i % 40) for i in range(60)))
    return load_text_dataset(path, DataConfig(seq_len=T), ByteTokenizer())


def same(a, b):
    return all((x == y).all() for x, y in zip(a, b, strict=True))


# Datasets


@pytest.mark.parametrize("packing", ["pack", "chunk"])
def test_dataset_holds_every_document_between_bos_and_eos(tmp_path, packing):
    path = tmp_path / "t.txt"
    path.write_text("first\nline\n\nsécond\n\n" + "long " * 20)
    data = load_text_dataset(path, DataConfig(seq_len=T, packing=packing), ByteTokenizer())
    real = data.segment_ids_NT > 0
    documents = ["first\nline", "sécond", "long " * 20]
    assert data.n_bytes == sum(len(d.encode()) for d in documents)
    assert ByteTokenizer().token_bytes[data.tokens_NT].sum() == data.n_bytes
    tokens = data.tokens_NT[real]
    assert (tokens == ByteTokenizer.bos_id).sum() == (tokens == ByteTokenizer.eos_id).sum() == len(documents)
    assert real.sum() == data.n_bytes + 2 * len(documents)
    assert (data.tokens_NT[~real] == ByteTokenizer().pad_id).all()
    if packing == "chunk":
        assert ByteTokenizer().decode(data.tokens_NT.reshape(-1)) == "".join(documents)
        assert (np.flatnonzero(tokens == 1)[1:] == np.flatnonzero(tokens == 2)[:-1] + 1).all()
    else:
        assert ByteTokenizer().decode(data.tokens_NT[0][data.segment_ids_NT[0] == 1]) == documents[0]


def test_load_datasets_splits_by_document_and_is_deterministic(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n".join(f"<{i}>" for i in range(200)))
    cfg = DataConfig(source="text", path=str(path), seq_len=T, valid_fraction=0.1)
    train, valid = load_datasets(cfg, ByteTokenizer(), seed=0)
    again = load_datasets(cfg, ByteTokenizer(), seed=0)
    assert (train.fingerprint, valid.fingerprint) == (again[0].fingerprint, again[1].fingerprint)
    assert train.fingerprint != load_datasets(cfg, ByteTokenizer(), seed=1)[0].fingerprint
    texts = [set(ByteTokenizer().decode(d.tokens_NT.reshape(-1))[1:-1].split("><")) for d in (train, valid)]
    assert len(texts[1]) == 20 and not texts[0] & texts[1]
    assert texts[0] | texts[1] == {str(i) for i in range(200)}
    assert {t.strip("<>") for t in training_texts(cfg, seed=0)} == texts[0]


def test_fingerprint_tells_text_cut_and_tokenizer_apart(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("some text\nand more")
    tokenizer = load_tokenizer(TokenizerConfig(kind="sentencepiece", vocab_size=300), lambda: ["some text"] * 9)
    prints = {
        load_text_dataset(path, DataConfig(seq_len=n, packing=packing), tok).fingerprint
        for n in (8, 16)
        for packing in ("pack", "chunk")
        for tok in (ByteTokenizer(), tokenizer)
    }
    assert len(prints) == 8
    path.write_text("some text\nand more!")
    assert load_text_dataset(path, DataConfig(seq_len=8), ByteTokenizer()).fingerprint not in prints


def test_every_source_gives_both_datasets(tmp_path):
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(50)))
    (tmp_path / "v.txt").write_text("held out")
    for cfg in (
        DataConfig(source="synthetic", synthetic_tokens=5000, seq_len=T),
        DataConfig(source="python-docs", seq_len=256),
        DataConfig(source="jsonl", path=str(tmp_path / "t.jsonl"), seq_len=T),
        DataConfig(source="jsonl", path=str(tmp_path), seq_len=T),
        DataConfig(source="synthetic", valid_path=str(tmp_path / "v.txt"), seq_len=T),
    ):
        train, valid = load_datasets(cfg, ByteTokenizer(), seed=0)
        assert train.n_bytes > valid.n_bytes > 0
        assert train.tokens_NT.shape[1] == valid.tokens_NT.shape[1] == cfg.seq_len


def test_held_out_text_that_is_trained_on_is_told_in_one_line(tmp_path, caplog):
    (tmp_path / "t.txt").write_text("one\n\ntwo\n\nthree\n\nfour")
    (tmp_path / "v.txt").write_text("two\n\nother\n\nnew")
    cfg = DataConfig(source="text", path=str(tmp_path / "t.txt"), seq_len=8)
    for valid, share in (("v.txt", "27.3 %"), ("t.txt", "100 %")):
        caplog.clear()
        load_datasets(dataclasses.replace(cfg, valid_path=str(tmp_path / valid)), ByteTokenizer(), seed=0)
        assert [record.levelname for record in caplog.records] == ["WARNING"] and share in caplog.text
    caplog.clear()
    load_datasets(dataclasses.replace(cfg, valid_fraction=0.3), ByteTokenizer(), seed=0)
    assert not caplog.records


def test_text_shorter_than_a_sequence(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("ab\ncd\nef")
    cfg = DataConfig(source="text", path=str(path), seq_len=64, valid_fraction=0.3)
    with pytest.raises(UsageError, match=r"data.path .*t.txt gives 8 tokens .* data.seq_len 64; write data.seq_len 8"):
        load_datasets(cfg, ByteTokenizer(), seed=0)
    with pytest.raises(UsageError, match=r"data.source synthetic gives 12 tokens"):
        load_datasets(DataConfig(source="synthetic", synthetic_tokens=10, seq_len=64), ByteTokenizer(), seed=0)
    assert len(load_text_dataset(path, cfg, ByteTokenizer())) == 1  # evaluating a short text is no mistake


def test_missing_file_of_ones_own(tmp_path):
    with pytest.raises(UsageError, match=r"data.path .*absent.txt does not exist"):
        load_text_dataset(tmp_path / "absent.txt", DataConfig(), ByteTokenizer())


# The stream


def test_batches_are_examples_of_the_dataset(dataset):
    loader = Loader(dataset, B, seed=0)
    examples = loader.batch(3)
    assert isinstance(examples, Examples)
    assert examples.tokens_BT.shape == (B, T) and {a.dtype for a in examples} == {np.dtype(np.int32)}
    ids = examples.example_ids_B
    assert (examples.tokens_BT == dataset.tokens_NT[ids]).all()
    assert (examples.segment_ids_BT == dataset.segment_ids_NT[ids]).all()
    assert (examples.positions_BT == dataset.positions_NT[ids]).all()
    fixed = Loader(dataset, B, seed=0, fixed=True)
    assert same(fixed.examples(fixed.batch_id(3)), examples)  # the first epoch is the same
    examples.tokens_BT[:] = -1  # a batch is a copy
    assert (dataset.tokens_NT >= 0).all()


@pytest.mark.parametrize("packing", ["pack", "chunk"])
@pytest.mark.parametrize("ids", ["apart", "bos is eos"])
def test_every_document_of_any_length_ends_with_a_target(packing, ids):
    """From the text to the batch: each end has weight, once, and no other special token has."""
    tokenizer = ByteTokenizer()
    if ids == "bos is eos":
        tokenizer.bos_id = tokenizer.eos_id
    vocab = vocab_of(tokenizer)
    everything = Noise(kind="fixed", low=1.0, high=1.0)
    made = {
        kind: jax.jit(partial(make_batch, Objective(kind=kind), Noise() if kind == "clm" else everything, vocab=vocab))
        for kind in ("clm", "mlm", "diffusion")
    }
    for length in range(1, 2 * T + 3):
        data = build_dataset(["x" * length] * 5, DataConfig(seq_len=T, packing=packing), tokenizer)
        rows = np.arange(16) % len(data)  # one shape for all lengths
        kept = np.arange(16) < len(data)
        segments_NT = np.where(kept[:, None], data.segment_ids_NT[rows], 0)
        examples = Examples(data.tokens_NT[rows], segments_NT, data.positions_NT[rows], rows.astype(np.int32))
        keys_B = example_keys(jax.random.key(0), examples.example_ids_B, 0)
        for kind, make in made.items():
            batch = make(examples=examples, keys_B=keys_B)
            targets = np.asarray(batch.targets_BT)[np.asarray(batch.weights_BT) > 0]
            assert (targets == tokenizer.eos_id).sum() == 5, (length, kind)
            assert set(targets.tolist()) == {tokenizer.eos_id, ord("x") + 4}


@pytest.fixture
def odd(dataset):
    """A dataset whose last sequences fill no batch."""
    n = len(dataset) // B * B - 1
    cut = {name: getattr(dataset, name)[:n] for name in ("tokens_NT", "segment_ids_NT", "positions_NT")}
    return dataclasses.replace(dataset, **cut)


def test_an_epoch_is_every_sequence_once(odd):
    loader, n = Loader(odd, B, seed=0), len(odd)
    ids = np.concatenate([loader.batch(i).example_ids_B for i in range(3 * n // B + 1)])[: 3 * n].reshape(3, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in ids.tolist())
    assert all((loader.batch(i).segment_ids_BT != 0).any(1).all() for i in range(3 * n // B))
    for i in range(3 * n // B):
        assert len(set(loader.batch(i).example_ids_B.tolist())) == B  # also where two epochs meet
    batches = [{tuple(sorted(b)) for b in epoch[: n // B * B].reshape(-1, B).tolist()} for epoch in ids]
    assert len(batches[0] & batches[1]) < 3  # they are cut in another way each time
    assert ids[0].tolist() != sorted(ids[0])


def test_batches_that_stay_the_same_hold_every_sequence_once_and_repeats_without_weight(odd):
    loader, n = Loader(odd, B, seed=0, fixed=True), -(-len(odd) // B)
    assert loader.n_batches == n > 3 and len(odd) % B
    orders = [[loader.batch_id(epoch * n + i) for i in range(n)] for epoch in range(4)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert orders[0] != list(range(n)) and len({tuple(order) for order in orders}) == 4
    seen: dict[int, Examples] = {}
    for i in range(3 * n):
        examples = loader.batch(i)
        assert same(seen.setdefault(loader.batch_id(i), examples), examples)
    weighted = np.concatenate([ex.example_ids_B[ex.segment_ids_BT.any(1)] for ex in seen.values()])
    assert sorted(weighted) == list(range(len(odd)))


def test_everything_is_a_function_of_dataset_seed_and_step(dataset):
    one, two, other = Loader(dataset, B, seed=0), Loader(dataset, B, seed=0), Loader(dataset, B, seed=1)
    for i in (40, 3, 17, 3):
        assert same(one.batch(i), two.batch(i))
    assert any(not same(one.batch(i), other.batch(i)) for i in range(3))


def test_without_shuffle_the_order_is_that_of_the_text(dataset):
    loader = Loader(dataset, B, seed=0, shuffle=False)
    n = loader.n_batches
    rows = np.concatenate([loader.batch(i).example_ids_B for i in range(2 * n)])
    assert rows.tolist() == [i % len(dataset) for i in range(2 * n * B)]
    fixed = Loader(dataset, B, seed=0, shuffle=False, fixed=True)
    assert [fixed.batch_id(n + i) for i in range(n)] == list(range(n))


def test_iterator_gives_the_stream_and_resumes_exactly(dataset):
    loader = Loader(dataset, B, seed=0)
    steps = 2 * loader.n_batches + 3
    iterator = loader.iterate(0)
    states = []
    for i in range(steps):
        states.append(json.loads(json.dumps(iterator.get_state())))
        assert same(next(iterator), loader.batch(i))
    iterator.close()
    for i in (0, 1, 5, steps - 1):
        resumed = Loader(dataset, B, seed=0).iterate(0)
        resumed.set_state(states[i])
        for j in range(i, i + 3):
            assert same(next(resumed), loader.batch(j))
        resumed.close()
        started = loader.iterate(i)
        assert started.get_state() == states[i]
        assert same(next(started), loader.batch(i))
        started.close()


def test_iterator_reads_ahead_in_another_thread(dataset):
    loader = Loader(dataset, B, seed=0)
    reached, threads = threading.Event(), set()
    plain = loader.batch

    def batch(i):
        threads.add(threading.get_ident())
        if i == 2:
            reached.set()
        return plain(i)

    loader.batch = batch
    iterator = loader.iterate(0)
    next(iterator)
    assert reached.wait(10) and threading.get_ident() not in threads
    iterator.close()


def test_too_large_a_batch_names_the_keys(dataset):
    n = len(dataset)
    with pytest.raises(
        UsageError, match=rf"data.batch_size {n + 1} is more than the {n} sequences .* data.seq_len {T}"
    ):
        Loader(dataset, n + 1, seed=0)
    assert Loader(dataset, n, seed=0).n_batches == 1
    with pytest.raises(UsageError, match=r"data.batch_size is 0; write at least 1"):
        Loader(dataset, 0, seed=0)
