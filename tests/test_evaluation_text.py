"""Which text is evaluated on."""

from __future__ import annotations

from types import SimpleNamespace

from tiny import tiny

from stackwise_jax.data import ByteTokenizer
from stackwise_jax.evaluation import held_out_text


def test_evaluating_on_the_training_text_is_told(tmp_path, caplog):
    for name in ("train.txt", "other.txt"):
        (tmp_path / name).write_text("some text\n\nand more of it")
    config = tiny("data.source=text", f"data.path={tmp_path / 'train.txt'}")
    loaded = SimpleNamespace(config=config, tokenizer=ByteTokenizer())
    assert len(held_out_text(loaded, tmp_path / "other.txt")) and not caplog.records
    assert len(held_out_text(loaded, tmp_path / ".." / tmp_path.name / "train.txt")) and "trained on" in caplog.text
