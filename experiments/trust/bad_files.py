"""What the bad inputs are about: a good run, odd files, damaged copies of the run. Everything lies in one folder."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from stackwise_jax.train import main as train

SMALL = {
    "data.source": "synthetic",
    "data.synthetic_tokens": 2048,
    "data.seq_len": 16,
    "data.batch_size": 8,
    "model.d_model": 16,
    "model.n_heads": 2,
    "model.d_ff": 32,
    "model.architecture.n_stacks": 2,
    "model.architecture.blocks_per_stack": 1,
    "curriculum.steps": 4,
    "run.eval_batches": 1,
    "run.tensorboard": "false",
    "run.sample_tokens": 0,
}
TEXT = "".join(f"Document {i} says {i * i}.\n\n" for i in range(200))
DEEP = 100_000  # levels of nesting
LETTERS = "abcdefghijklmnopqrstuvwxyz"
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise(LETTERS))


def small(**changes: Any) -> list[str]:
    """The arguments of the small run, with other values for some keys (a dot is written as two underscores)."""
    keys = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--{key}={value}" for key, value in keys.items()]


def build(folder: Path, runs: Iterable[str] | None = None) -> None:
    """Train the good run and lay down everything else: good/, files/, runs/, canary/ and an empty cwd/.

    Args:
        runs: the damaged runs to make; None: all.
    """
    for name in ("files", "runs", "canary", "cwd"):
        (folder / name).mkdir(parents=True)
    (folder / "canary" / "precious.txt").write_text("must stay")
    with contextlib.redirect_stdout(io.StringIO()):
        if train(small(run__dir=folder / "good")):
            raise SystemExit("the good run could not be trained")
    for name, make in FILES.items():
        make(folder / "files" / name)
    for name in RUNS if runs is None else runs:
        run = shutil.copytree(folder / "good", folder / "runs" / name)
        RUNS[name](run)
        fit_digests(run)


def fit_digests(run: Path) -> None:
    """Make the records of a run give the digests that its files have now, as somebody who wants to harm would.

    A record that cannot be read, or has something else than a table of digests, stays as it is.
    """

    def digests(record: Any) -> Any:
        table = record["progress"]["digests"]
        for name in table:
            if (run / name).is_file() and not (run / name).is_symlink():
                table[name] = hashlib.sha256((run / name).read_bytes()).hexdigest()
        return record

    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError, OSError):
        if all(path.is_file() for path in run.glob(PROGRESS)):
            edit(PROGRESS, digests)(run)


def snapshot(folder: Path) -> dict[str, tuple]:
    """Kind, size and times of everything in a folder, which change when it is written; locks are held, not written."""
    found = {}
    for above, folders, files in os.walk(folder):
        for name in folders + [name for name in files if name != ".lock"]:
            path = os.path.join(above, name)
            about = os.lstat(path)
            sizes = () if stat.S_ISDIR(about.st_mode) else (about.st_size, about.st_mtime_ns)
            found[path] = (about.st_mode, about.st_ino, *sizes)
    return found


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file of ordinary size in a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 2**24)
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# Odd files.


def content(data: bytes | str) -> Callable[[Path], Any]:
    """Makes a file of this content."""
    return lambda path: path.write_bytes(data.encode() if isinstance(data, str) else data)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**36)


def loop(path: Path) -> None:
    path.symlink_to(path)


def folder_of(**files: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Makes a folder; an underscore in a name stands for a dot."""

    def make(path: Path) -> None:
        path.mkdir()
        for name, write in files.items():
            write(path / name.replace("_", "."))

    return make


FILES: Mapping[str, Callable[[Path], Any]] = {
    "good.txt": content(TEXT),
    "empty.txt": content(""),
    "blank.txt": content(" \n\n\t\n"),
    "one-line.txt": content("one line"),
    "latin1.txt": content("caf\xe9\n\nna\xefve\n".encode("latin1")),
    "utf16.txt": content(TEXT.encode("utf-16")),
    "utf16-no-mark.txt": content(TEXT.encode("utf-16-le")),
    "utf32.txt": content(TEXT.encode("utf-32")),
    "marks-only.txt": content(codecs.BOM_UTF8),
    "zero-bytes.txt": content(b"a\n\nb\x00c\n"),
    "random.txt": content(random.Random(0).randbytes(4096)),
    "archive.txt": content(b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + bytes(100)),
    "pipe.txt": os.mkfifo,
    "loop.txt": loop,
    "dangling.txt": lambda path: path.symlink_to("absent"),
    "folder.txt": folder_of(),
    "folder": folder_of(),
    "folder-with-pipe": folder_of(a_txt=content(TEXT), b_txt=os.mkfifo),
    "folder-with-dangling": folder_of(a_txt=content(TEXT), b_txt=lambda path: path.symlink_to("absent")),
    "folder-with-utf16": folder_of(a_txt=content(TEXT), b_txt=content(TEXT.encode("utf-16"))),
    "deep.jsonl": content('{"text": "a"}\n' + "[" * DEEP + "\n"),
    "list.jsonl": content('["a"]\n'),
    "null.jsonl": content("null\n"),
    "no-key.jsonl": content('{"body": "a"}\n'),
    "number.jsonl": content('{"text": 1}\n'),
    "twice.jsonl": content('{"text": "a", "text": "b"}\n'),
    "surrogate.jsonl": content('{"text": "\\ud800"}\n'),
    "cut.jsonl": content('{"text": "a'),
    "nan.jsonl": content('{"text": NaN}\n'),
    "digits.jsonl": content('{"text": ' + "9" * 5000 + "}\n"),
    "empty.model": content(""),
    "byte.model": content(b"\x0a"),
    "random.model": content(random.Random(1).randbytes(4096)),
    "text.model": content("this is no model"),
    "json.model": content('{"model": {"vocab": {}}}'),
    "large.model": sparse,
    "pipe.model": os.mkfifo,
    "folder.model": folder_of(),
    "no-utf8.model": content(
        b"\x0a\x0e\x0a\x05<unk>\x15\0\0\x80\xbf\x18\x02" + b"\x0a\x0b\x0a\x02\xff\xfe\x15\0\0\x80\xbf\x18\x01"
    ),
    "large.yaml": sparse,
    "pipe.yaml": os.mkfifo,
    "folder.yaml": folder_of(),
    "loop.yaml": loop,
}


# Damaged runs.


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Changes what JSON files of a run say; their checksums are made to fit, as somebody who wants to harm would."""

    def damage(run: Path) -> None:
        for path in run.glob(name):
            saved = json.loads(path.read_text())
            if isinstance(saved, dict) and saved.keys() == {"sha256", "data"}:
                data = change(saved["data"])
                sum_ = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
                path.write_text(json.dumps({"sha256": sum_, "data": data}))
            else:
                path.write_text(json.dumps(change(saved)))

    return damage


def write(name: str, data: bytes | str) -> Callable[[Path], None]:
    """Gives files of a run this content."""

    def damage(run: Path) -> None:
        for path in run.glob(name):
            content(data)(path)

    return damage


def replace(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Puts something else in the place of files or folders of a run."""

    def damage(run: Path) -> None:
        for path in [*run.glob(name)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            make(path)

    return damage


def put(tree: Any, keys: str, value: Any) -> Any:
    """A value put into nested dicts, at keys with slashes between them; * stands for all keys."""
    key, _, rest = keys.partition("/")
    for name in list(tree) if key == "*" else [key]:
        tree[name] = put(tree[name], rest, value) if rest else value
    return tree


def set_value(name: str, keys: str, value: Any) -> Callable[[Path], None]:
    return edit(name, lambda data: put(data, keys, value))


PROGRESS, META = "checkpoints/progress/*.json", "checkpoints/*/**/meta.json"
RUNS: Mapping[str, Callable[[Path], None]] = {
    "no-config": replace("config.yaml", lambda path: None),
    "config-empty": write("config.yaml", ""),
    "config-binary": write("config.yaml", b"\xff\xfe\x00"),
    "config-deep": write("config.yaml", "[" * DEEP),
    "config-aliases": write("config.yaml", BOMB),
    "config-pipe": replace("config.yaml", os.mkfifo),
    "config-link": replace("config.yaml", lambda path: path.symlink_to("../../canary/precious.txt")),
    "config-huge": write("config.yaml", "model:\n  architecture:\n    n_stacks: 1000000000\n"),
    "config-type": write("config.yaml", "model: [1, 2]\n"),
    "rack-empty": write("rack.json", ""),
    "rack-list": write("rack.json", "[]"),
    "rack-deep": write("rack.json", "[" * DEEP),
    "rack-vocab": set_value("rack.json", "vocab_size", 10**11),
    "rack-blocks": set_value("rack.json", "stacks", [{"n_blocks": 10**6}]),
    "rack-pipe": replace("rack.json", os.mkfifo),
    "phases-empty": write("phases.json", ""),
    "phases-object": write("phases.json", "{}"),
    "phases-numbers": write("phases.json", "[1, 2]"),
    "phases-deep": write("phases.json", "[" * DEEP),
    "phases-digits": write("phases.json", "[" + "9" * 5000 + "]"),
    "progress-text": write(PROGRESS, "x"),
    "progress-list": write(PROGRESS, "[]"),
    "progress-deep": write(PROGRESS, "[" * DEEP),
    "progress-no-versions": edit(PROGRESS, lambda data: put(data, "progress/versions", {})),
    "progress-versions-list": set_value(PROGRESS, "progress/versions", [1]),
    "progress-version-text": set_value(PROGRESS, "progress/versions/*", "x"),
    "progress-phase": set_value(PROGRESS, "progress/phase", 10**20),
    "progress-phase-text": set_value(PROGRESS, "progress/phase", "x"),
    "progress-results": set_value(PROGRESS, "progress/results", [1, None]),
    "progress-format": set_value(PROGRESS, "format", 99),
    "progress-above": set_value(PROGRESS, "progress/versions", {"../../../canary": 1}),
    "progress-pipe": replace(PROGRESS, os.mkfifo),
    "no-progress": replace("checkpoints/progress", lambda path: None),
    "meta-empty": write(META, ""),
    "meta-list": write(META, "[]"),
    "meta-deep": write(META, "[" * DEEP),
    "meta-leaves": set_value(META, "leaves", {"x": "y"}),
    "meta-files": set_value(META, "files", {"../../../../canary/precious.txt": "0"}),
    "meta-shape": set_value(META, "leaves", {"kernel": {"shape": [10**9, 10**9], "dtype": "float32"}}),
    "meta-format": set_value(META, "meta/format", "\x1b[31mred"),
    "meta-history": set_value(META, "meta/loss_history", [1, "x", None]),
    "no-arrays": replace("checkpoints/*/**/arrays", lambda path: None),
    "arrays-file": replace("checkpoints/*/**/arrays", content("x")),
    "arrays-link": replace("checkpoints/embed/*/arrays", lambda path: path.symlink_to("../../../../../canary")),
    "no-checkpoints": replace("checkpoints", lambda path: None),
    "checkpoints-file": replace("checkpoints", content("x")),
    "stacks-link": replace("checkpoints/stacks/001", lambda path: path.symlink_to("../../../../canary")),
    "no-tokenizer": replace("tokenizer", lambda path: None),
    "tokenizer-file": replace("tokenizer", content("x")),
    "tokenizer-list": write("tokenizer/tokenizer.json", "[1]"),
    "tokenizer-deep": write("tokenizer/tokenizer.json", "[" * DEEP),
    "tokenizer-pipe": replace("tokenizer/tokenizer.json", os.mkfifo),
    "tokenizer-kind": set_value("tokenizer/tokenizer.json", "kind", {"a": 1}),
    "tokenizer-no-model": set_value("tokenizer/tokenizer.json", "kind", "sentencepiece"),
}  # fmt: skip
