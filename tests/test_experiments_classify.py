"""The text classifier: sizes are equal, padding does not count, the best step is kept; and it learns at all."""

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from stackwise_jax.config import load_config
from stackwise_jax.data import ByteTokenizer, LabelledTexts, encode_labelled, labelled_batches
from stackwise_jax.errors import UsageError

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
MHA = "bert_style"
NAMES = ("train", "valid", "test")
SIZES = ["data.batch_size=4", "model.d_model=16", "model.n_heads=2", "model.d_ff=32", "model.freeze_up_proj=false"]
SIZES += ["model.architecture.n_stacks=2", "model.architecture.blocks_per_stack=1"]


def files(folder: Path) -> list[str]:
    """Options that name three files of texts that are good or bad by one character."""
    for i, name in enumerate(NAMES):
        lines = [f"{j // 2}{'?!'[j % 2]}{'.' * (j % 5)}\t{['no', 'yes'][j % 2]}" for j in range(i, 60 - 8 * i)]
        (folder / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]))
    return [f"--{name}={folder / name}.tsv" for name in NAMES]


@pytest.fixture
def classify(monkeypatch):
    """The experiment as a module."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("classify_text")


def small(classify, *presets: str):
    """(configuration of the first, racks) of the smallest sizes; no preset: bert_style."""
    changes = [f"--{change}" for change in SIZES]
    configs = {name: load_config(None, [*changes, f"--model.attention_preset={name}"]) for name in presets or [MHA]}
    return next(iter(configs.values())), classify.equal_racks(configs, ByteTokenizer.vocab_size)


def sequences(seq_len: int = 16):
    texts = tuple("x" * (1 + i) for i in range(12))
    return encode_labelled(LabelledTexts(texts, (0, 1) * 6, ("a", "b")), ByteTokenizer(), seq_len)


def test_it_learns_what_one_character_tells(tmp_path):
    command = [sys.executable, str(EXPERIMENTS / "classify_text.py"), *files(tmp_path), "--rates=1e-2"]
    command += ["--attention=bert_style", "--attention=mlgka,kernel.features=8", "--set=model.architecture.n_stacks=1"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, "--smoke", "--json"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["classes"] == ["no", "yes"] and result["examples"] == [60, 51, 42] and result["majority"] == 0.5
    mha, mlgka, bag = result["rows"]
    assert [row["attention"] for row in result["rows"]] == [
        "bert_style",
        "mlgka,kernel.features=8",
        "bag of embeddings",
    ]
    assert mha["d_ff"] == 32 < mlgka["d_ff"] and mlgka["stacks"] == pytest.approx(mha["stacks"], rel=0.02)
    assert mha["fixed"] == 0 and mlgka["fixed"] == 8 * 4  # the random matrix: the head size, half the features
    assert bag["stacks"] == 0 and mha["parameters"] - bag["parameters"] == mha["stacks"]
    assert all(len(row["test"]) == 1 and row["test"][0] > 0.9 for row in result["rows"])
    assert bag["bytes"] < mha["bytes"] and bag["cpu_seconds_per_step"] < mha["cpu_seconds_per_step"]


def test_a_wrong_line_is_told_in_one_sentence(tmp_path):
    given = files(tmp_path)
    (tmp_path / "test.tsv").write_text("text\tlabel\nwhat\tperhaps\n")
    command = [sys.executable, str(EXPERIMENTS / "classify_text.py"), *given, "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 2
    assert "test.tsv, line 2: the label 'perhaps' is none of ['no', 'yes']" in done.stderr.splitlines()[-1]


def test_feed_forward_makes_up_for_the_attention_or_says_that_it_cannot(classify):
    _, racks = small(classify, MHA, "efficient_gqa", "mla_attention", "kernel_attention", "mlgka")
    sizes = [classify.stack_numbers(rack) for rack in racks.values()]
    held = jax.eval_shape(racks[MHA].init_params, jax.random.key(0))["stacks"]
    assert sizes[0] == sum(leaf.size for leaf in jax.tree.leaves(held))
    assert sizes == pytest.approx([sizes[0]] * 5, rel=0.02)
    assert len({rack.stacks[0].blocks[0].d_ff for rack in racks.values()}) > 2
    narrow = ["--model.d_ff=1", "--model.d_model=16", "--model.n_heads=4"]
    configs = {
        name: load_config(None, [*narrow, f"--model.attention_preset={name}"]) for name in ("efficient_gqa", MHA)
    }
    with pytest.raises(UsageError, match=r"no model\.d_ff gives the stacks of bert_style the size of efficient_gqa's"):
        classify.equal_racks(configs, 260)


def test_padding_and_what_is_left_out_do_not_count(classify):
    _, racks = small(classify)
    model = classify.Classifier(racks[MHA], racks[MHA].stacks, 2)
    learning, fixed = jax.jit(model.init)(jax.random.key(0))
    learning["head"]["kernel"] = jax.random.normal(jax.random.key(1), (16, 2))
    short, long = (next(labelled_batches(sequences(n), rows)) for n, rows in ((16, 12), (24, 16)))
    logits_BC, padded_BC = (jax.jit(model.logits)(learning, fixed, batch.examples, None) for batch in (short, long))
    assert np.ptp(logits_BC) > 0.1 and np.isfinite(padded_BC).all()
    np.testing.assert_allclose(padded_BC[:12], logits_BC, rtol=1e-5, atol=1e-5)
    right, _ = jax.jit(functools.partial(classify.scores, model))(learning, fixed, long)
    assert right == (logits_BC.argmax(-1) == short.labels_B).sum()


def test_best_step_is_kept_and_patience_ends_a_run(classify, tmp_path, monkeypatch):
    config, racks = small(classify)
    data = classify.Data(sequences(), sequences(), sequences(), 260)
    options = ["--steps=20", "--eval_every=2", "--patience=2", "--token_dropout=0.5"]
    _, args = classify.options([*files(tmp_path), *options])
    trainer = classify.Trainer(classify.Classifier(racks[MHA], (), 2), data, config, args)
    seen = []
    looks = iter([(0.5, 1.0), (0.7, 1.0), (0.7, 0.9), (0.6, 0.1), (0.7, 0.9), (0.1, 0.0)])

    def evaluate(learning, fixed, dataset):
        seen.append(np.asarray(learning["embed"]["embedding"]).copy())
        return next(looks)

    monkeypatch.setattr(trainer, "_evaluate", evaluate)
    outcome = trainer.run(1e-2, seed=0)
    assert outcome == classify.Outcome(valid=0.7, valid_loss=0.9, test=0.1, step=6, steps=10)
    assert (seen[-1] == seen[2]).all() and (seen[-1] != seen[3]).any()
    before = jax.tree.leaves(trainer._timed)[0]
    trainer.steps(1)
    assert before.is_deleted()  # the state is donated


def test_runs_repeat_bit_by_bit_and_differ_by_seed(classify, tmp_path):
    config, racks = small(classify)
    data = classify.Data(sequences(), sequences(), sequences(), 260)
    _, args = classify.options([*files(tmp_path), "--steps=4", "--eval_every=4", "--token_dropout=0.5"])
    trainer = classify.Trainer(classify.Classifier(racks[MHA], (), 2), data, config, args)
    first, again, other = (trainer.run(1e-2, seed).valid_loss for seed in (0, 0, 1))
    assert first == again != other
