"""Which text is evaluated on."""

from __future__ import annotations

from types import SimpleNamespace

from tiny import tiny

from stackwise_jax.data import ByteTokenizer
from stackwise_jax.evaluation import held_out_text


def test_evaluating_on_training_text_is_told_wherever_it_lies(tmp_path, caplog):
    (tmp_path / "text").mkdir()
    for name, text in (("text/a", "some text\n\nand more"), ("text/b", "other\n\nwords"), ("new", "none\n\nof it")):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "copy.txt").write_text("unknown!\n\nand more")
    config = tiny("data.source=text", f"data.path={tmp_path / 'text'}", f"data.valid_path={tmp_path / 'new.txt'}")
    loaded = SimpleNamespace(config=config, tokenizer=ByteTokenizer())
    for name, share in (("text/a.txt", "100 %"), ("copy.txt", "50 %"), ("new.txt", None)):
        caplog.clear()
        assert len(held_out_text(loaded, tmp_path / name))
        assert (share is None and not caplog.records) or (len(caplog.records) == 1 and share in caplog.text)
    (tmp_path / "text" / "a.txt").unlink()
    (tmp_path / "text" / "b.txt").unlink()
    assert len(held_out_text(loaded, tmp_path / "new.txt"))
