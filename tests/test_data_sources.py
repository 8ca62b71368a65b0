"""Where documents come from: files, the documentation of Python, the Markov source; and the held-out split."""

import collections
import itertools
import json
import math
import os
import random
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from stackwise_jax.config.schema import DataConfig
from stackwise_jax.data import builtin, markov_entropy, sources
from stackwise_jax.data.sources import read_documents, shuffled, split_documents, text_documents
from stackwise_jax.errors import UsageError


def text_config(path, **keys):
    return DataConfig(source="text", path=str(path), **keys)


# Files


def test_paragraphs_else_lines():
    assert text_documents("one\ntwo\n\nthree\n \t\n\n  four\n") == ["one\ntwo", "three", "  four"]
    assert text_documents("one\r\ntwo\r\n\r\nthree\r\n") == ["one\r\ntwo", "three"]
    assert text_documents("one\ntwo\n") == ["one", "two"]
    assert text_documents("\n\n\none\ntwo\n\n") == ["one", "two"]
    assert text_documents(" \n\n \n") == []


def test_folder_is_read_in_order_of_path_each_file_alone(tmp_path):
    (tmp_path / "b.txt").write_text("b1\nb2\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_text("z1\n\nz2")
    (tmp_path / "c.md").write_text("not text")
    (tmp_path / "empty.txt").write_text("")
    assert read_documents(tmp_path, text_config(tmp_path), "data.path") == ["z1", "z2", "b1", "b2"]


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "t.txt").write_bytes("\ufeffone\ntwo".encode())
    assert read_documents(tmp_path / "t.txt", text_config("t"), "data.path") == ["one", "two"]


def test_jsonl(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = [{"text": "one\n\nstill one\u2028"}, {"body": "x", "text": "é"}, {"text": " "}]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8")
    cfg = DataConfig(source="jsonl", path=str(path))
    assert read_documents(path, cfg, "data.path") == ["one\n\nstill one\u2028", "é"]
    assert read_documents(tmp_path, cfg, "data.path") == ["one\n\nstill one\u2028", "é"]
    assert read_documents(path, DataConfig(), "data.path") == ["one\n\nstill one\u2028", "é"]  # by the name
    (tmp_path / "t.txt").write_text("a\nb")
    assert read_documents(tmp_path / "t.txt", cfg, "data.path") == ["a", "b"]
    (tmp_path / "nameless").write_bytes(path.read_bytes())
    assert read_documents(tmp_path / "nameless", cfg, "data.path") == ["one\n\nstill one\u2028", "é"]


def test_held_out_documents_are_disjoint_complete_and_drawn_by_seed(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n\n".join(f"document {i}" for i in range(100)))
    train, valid = split_documents(text_config(path, valid_fraction=0.1), seed=3)
    assert len(valid) == 10 and not set(train) & set(valid)
    assert sorted(train + valid) == sorted(f"document {i}" for i in range(100))
    assert train == sorted(train, key=lambda t: int(t.split()[1]))
    assert (train, valid) == split_documents(text_config(path, valid_fraction=0.1), seed=3)
    assert set(valid) != set(split_documents(text_config(path, valid_fraction=0.1), seed=4)[1])
    assert [len(part) for part in split_documents(text_config(path, valid_fraction=0.001), seed=3)] == [99, 1]
    assert [len(part) for part in split_documents(text_config(path, valid_fraction=0.999), seed=3)] == [1, 99]


def test_valid_path_holds_out_nothing_of_the_training_text(tmp_path):
    (tmp_path / "t.txt").write_text("a\nb\nc")
    (tmp_path / "v.txt").write_text("d\n")
    cfg = text_config(tmp_path / "t.txt", valid_path=str(tmp_path / "v.txt"))
    assert split_documents(cfg, seed=0) == (["a", "b", "c"], ["d"])


def test_shuffled_is_a_permutation_pinned_for_good():
    assert sorted(shuffled(1000, 5)) == list(range(1000))
    assert shuffled(8, 0, 1).tolist() == shuffled(8, 0, 1).tolist() != shuffled(8, 0, 2).tolist()
    # A run that is continued with another numpy must go on with the same batches.
    assert shuffled(8, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]


BAD_FILES = {
    "missing": (None, r"data.path .*t.txt does not exist"),
    "empty": (b"", r"data.path .*t.txt holds no text"),
    "blank": (b" \n\n\t\n", r"data.path .*t.txt holds no text"),
    "latin1": ("café".encode("latin1"), r"data.path: .*t.txt is not UTF-8 text \(byte 3\)"),
    "UTF-16": ("café\n\nb".encode("utf-16"), r"t.txt is not UTF-8 text but utf-16; .*iconv -f utf-16 -t utf-8"),
    "UTF-16 big": ("\ufeffab".encode("utf-16-be"), r"t.txt is not UTF-8 text but utf-16; .*iconv -f utf-16 -t utf-8"),
    "UTF-16 without a mark": ("café\n\nb".encode("utf-16-le"), r"t.txt is not UTF-8 text but utf-16le; .*-f utf-16le"),
    "UTF-32": ("ab".encode("utf-32"), r"t.txt is not UTF-8 text but utf-32; .*iconv -f utf-32 -t utf-8"),
    "binary": (b"ab\x00\xff\xfe" + b"x" * 99, r"t.txt is not UTF-8 text but a binary file \(byte 2 is zero\)"),
    "zero byte": (b"one\n\ntwo\x00", r"t.txt is not UTF-8 text but a binary file \(byte 8 is zero\)"),
    "single": (b"only one line", r"single document, so none can be held out.*data.valid_path"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_text_file(tmp_path, case):
    content, message = BAD_FILES[case]
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        split_documents(text_config(path), seed=0)


BAD_LINES = {
    "no JSON": ('{"text": "a"', r"d.jsonl, line 3: is no JSON"),
    "no key": ('{"body": "a"}', r"d.jsonl, line 3: has no key 'text'.*data.text_key"),
    "no object": ('["text"]', r"d.jsonl, line 3: has no key 'text'"),
    "no string": ('{"text": 3}', r"d.jsonl, line 3: 'text' is no string"),
    "deep": ("[" * 100_000, r"d.jsonl, line 3: is nested too deeply"),
    "twice": ('{"text": "a", "text": "b"}', r"d.jsonl, line 3: is no JSON \(the key 'text' stands twice\)"),
    "null": ('{"text": null}', r"d.jsonl, line 3: 'text' is no string"),
    "half a pair": ('{"text": "\\ud83d"}', r"d.jsonl, line 3: 'text' holds half of a surrogate pair"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_jsonl_line_is_named(tmp_path, case):
    line, message = BAD_LINES[case]
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(UsageError, match=message):
        split_documents(DataConfig(source="jsonl", path=str(path)), seed=0)


def test_what_stands_beside_the_text_does_not_matter(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a", "n": ' + "9" * 5000 + '}\n{"x": NaN, "text": "b", "y": -Infinity}\n')
    assert read_documents(path, DataConfig(source="jsonl"), "data.path") == ["a", "b"]


@pytest.mark.parametrize("make", ["pipe", "device", "loop", "long name", "file in the way"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make):
    path = tmp_path / "t.txt"
    if make == "pipe":
        os.mkfifo(path)
    elif make == "device":
        path = Path("/dev/zero")
    elif make == "loop":
        path.symlink_to(path)
    elif make == "long name":
        path = tmp_path / ("x" * 300)
    else:
        path.write_text("")
        path = path / "t.txt"
    with pytest.raises(UsageError, match=r"data\.path[: ].*(cannot be read|does not exist)") as failure:
        read_documents(path, DataConfig(source="text"), "data.path")
    assert "\n" not in str(failure.value)


def test_an_empty_path_is_not_the_working_directory():
    with pytest.raises(UsageError, match=r"data\.valid_path is empty"):
        split_documents(DataConfig(source="synthetic", valid_path=""), seed=0)


def test_nothing_in_a_folder_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "below").mkdir()
    cfg = DataConfig(source="text")
    gone = tmp_path / "below" / "b.txt"
    gone.symlink_to(tmp_path / "absent")  # as a file that vanishes between listing and reading
    with pytest.raises(UsageError, match=r"data.path: .*b.txt cannot be read \(No such file"):
        read_documents(tmp_path, cfg, "data.path")
    gone.unlink()
    assert read_documents(tmp_path, cfg, "data.path") == ["one", "two"]

    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("below"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"below cannot be read \(Permission denied\)"):
        read_documents(tmp_path, cfg, "data.path")


def test_bad_paths_and_keys(tmp_path):
    for cfg, message in [
        (DataConfig(source="text"), r"data.source text needs data.path"),
        (DataConfig(source="jsonl"), r"data.source jsonl needs data.path"),
        (DataConfig(path="x.txt"), r"data.path x.txt is given but data.source python-docs reads no file"),
        (DataConfig(source="synthetic", path="x"), r"data.source synthetic reads no file"),
        (DataConfig(source="synthetic", valid_fraction=0.0), r"data.valid_fraction is 0.0"),
        (DataConfig(source="synthetic", valid_fraction=1.0), r"data.valid_fraction is 1.0"),
        (DataConfig(source="synthetic", seq_len=1), r"data.seq_len is 1; write at least 2"),
        (DataConfig(source="synthetic", synthetic_tokens=0), r"data.synthetic_tokens is 0"),
        (DataConfig(source="synthetic", valid_path="absent"), r"data.valid_path absent does not exist"),
        (text_config(tmp_path), r"data.path .* is a folder without a \.txt file"),
        (DataConfig(source="jsonl", path=str(tmp_path)), r"data.path .* is a folder without a \.jsonl file"),
    ]:
        with pytest.raises(UsageError, match=message):
            split_documents(cfg, seed=0)


def test_failing_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_text("a\nb")

    def refuse(path, limit):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources, "read_regular", refuse)
    with pytest.raises(UsageError, match=r"t.txt cannot be read \(Permission denied\)"):
        split_documents(text_config(path), seed=0)


# Python's documentation


def test_python_docs_is_about_two_megabytes_of_english_and_deterministic():
    builtin.python_docs.cache_clear()
    documents = builtin.python_docs()
    assert 1_500_000 < sum(len(d.encode()) for d in documents) < 2_500_000
    assert 400 < len(documents) < 1000
    words = " ".join(documents).split()
    assert words.count("the") / len(words) > 0.03
    builtin.python_docs.cache_clear()
    assert builtin.python_docs() == documents


def make_library(root):
    modules = {
        "zoo.py": '''
            """About zoo."""
            raise SystemExit("was imported")
            class Animal:
                """An animal."""
                if True:
                    def eat(self):
                        """Eat."""
            def cage():
                """About zoo."""
                async def inner():
                    "Inside."
            ''',
        "ape/__init__.py": '"""About zoo."""\n"not a docstring"\nx = "nor this"',
        "ape/bee.py": '"""Bee: caf\\u00e9 \\ud800."""',
        "bad/syntax.py": '"""Never."""\ndef (:',
        "test/test_zoo.py": '"""Never."""',
        "site-packages/other.py": '"""Never."""',
        "notes.txt": '"""Never."""',
        "pydoc_data/topics.py": 'topics = {"b": "topic b", "a": r"topic a", "c": " "}\nraise SystemExit',
    }
    for name, source in modules.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
    (root / "bad" / "bytes.py").write_bytes(b'"""Never \xff\xfe."""')
    (root / "bad" / "null.py").write_bytes(b'"""Never."""\x00')
    (root / "bad" / "folder.py").mkdir()
    (root / "bad" / "dangling.py").symlink_to(root / "nowhere.py")


@pytest.mark.filterwarnings("error")
def test_python_docs_reads_docstrings_without_importing_and_passes_over_bad_files(tmp_path):
    make_library(tmp_path)
    before = set(sys.modules)
    documents = builtin.python_docs(tmp_path)
    assert documents == (
        "topic a",
        "topic b",
        "About zoo.",
        "Bee: café ?.",
        "An animal.\n\nEat.\n\nInside.",
    )
    assert not {"zoo", "ape", "pydoc_data"} & (set(sys.modules) - before)


def test_python_docs_without_sources_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"data.source python-docs .* holds none; write data.source text"):
        builtin.python_docs(tmp_path)


# The Markov source


def test_markov_entropy_is_what_is_measured():
    assert abs(markov_entropy() - 0.40) < 0.005
    text = "".join(builtin.markov_documents(400_000, seed=0, part=0))
    follower = {a: builtin.SYMBOLS[builtin.markov_follower(i)] for i, a in enumerate(builtin.SYMBOLS)}
    hit = np.mean([follower[a] == b for a, b in itertools.pairwise(text)])
    # A fair estimate from counts: cross-entropy of the second half under the transitions of the first.
    half = len(text) // 2
    counts = collections.Counter(itertools.pairwise(text[:half]))
    totals = collections.Counter(text[: half - 1])
    pairs = list(itertools.pairwise(text[half:]))
    nats = -np.mean([math.log((counts[a, b] + 0.01) / (totals[a] + 0.64)) for a, b in pairs])
    assert abs(hit - (0.95 + 0.05 / 64)) < 0.002
    assert abs(nats - markov_entropy()) < 0.04


def test_markov_starts_and_stays_uniform_over_64_symbols():
    documents = builtin.markov_documents(4096 * 300, seed=1, part=0)
    assert {len(d) for d in documents} == {4096}
    starts = collections.Counter(d[0] for d in documents)
    assert len(starts) > 55 and max(starts.values()) < 20
    frequency = collections.Counter("".join(documents))
    assert set(frequency) == set(builtin.SYMBOLS) and len(set(builtin.SYMBOLS)) == 64
    assert max(frequency.values()) < 1.1 * min(frequency.values())


def test_markov_sample_is_drawn_by_seed_and_part():
    one = builtin.markov_documents(5000, seed=0, part=0)
    assert [len(d) for d in one] == [4096, 904]
    assert one == builtin.markov_documents(5000, seed=0, part=0)
    assert one != builtin.markov_documents(5000, seed=1, part=0)
    assert one != builtin.markov_documents(5000, seed=0, part=1)
    train, valid = split_documents(DataConfig(source="synthetic", synthetic_tokens=100_000), seed=0)
    assert (sum(map(len, train)), sum(map(len, valid))) == (100_000, 5000)
    assert not set(train) & set(valid)


def test_followers_visit_every_symbol():
    seen, symbol = [], random.Random(0).randrange(64)
    for _ in range(64):
        seen.append(symbol)
        symbol = builtin.markov_follower(symbol)
    assert len(set(seen)) == 64
