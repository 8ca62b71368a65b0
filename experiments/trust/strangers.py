"""Run directories from strangers: what the commands do with links, bombs, stray files and changed records.

A tiny run is trained and stopped in its last phase. Each case changes a copy of it for each command. A case fails where
a command prints a traceback, needs more than 60 s or 1 GB, touches anything outside the run, sends an escape sequence
to the terminal, does not say in one sentence what is wrong, or accepts what it has to refuse.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from small_run import SMALL

from stackwise_jax.checkpoint.files import read_json, write_json
from stackwise_jax.checkpoint.items import META, _file_digest
from stackwise_jax.engine.entries import digests

SECONDS, BYTES = 60, 10**9
ESCAPE = "\x1b]0;stranger\x07"
TINY = SMALL | {
    "curriculum.steps": 4,
    "run.save_every": 2,
    "run.keep": 3,
}
OPTIONS = [f"--{key}={value}" for key, value in TINY.items()]
COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "evaluate": lambda run: [str(run)],
    "generate": lambda run: [str(run), "--prompt", "1", "--max_tokens", "2"],
    "inspect": lambda run: [str(run), "--norms"],
    "convert": lambda run: [str(run), str(run.with_name("converted")), "--format", "int8"],
    "train": lambda run: [*OPTIONS, f"--run.dir={run}"],
}
LOADING = ("evaluate", "generate", "convert", "train")
EVERY = tuple(COMMANDS)

Change = Callable[[Path, Path], None]  # (run, a directory outside of it)


def item(run: Path, name: str = "stacks/001") -> Path:
    """The version of an item that the newest record names."""
    version = read_json(record(run))["progress"]["versions"][name]
    return run / "checkpoints" / name / f"{version:08d}"


def record(run: Path) -> Path:
    return max((run / "checkpoints" / "progress").glob("*.json"))


def at(run: Path, place: str) -> Path:
    """A path in the run; ITEM and RECORD stand for the newest."""
    return record(run) if place == "RECORD" else run / place.replace("ITEM", str(item(run).relative_to(run)))


def link(place: str) -> Change:
    """Put what is there outside, and a link in its place; a link to a new directory where nothing is."""

    def change(run: Path, outside: Path) -> None:
        path = at(run, place)
        if path.exists():
            path.rename(outside / path.name)
        elif path.suffix:
            (outside / path.name).write_text("outside")
        else:
            (outside / path.name).mkdir()
            (outside / path.name / "file").write_text("outside")
        path.symlink_to(outside / path.name)

    return change


def put(place: str, content: bytes) -> Change:
    def change(run: Path, outside: Path) -> None:
        at(run, place).write_bytes(content)

    return change


def pipe(place: str) -> Change:
    def change(run: Path, outside: Path) -> None:
        path = at(run, place)
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    return change


def forged(where: Callable[[Path], Path], edit: Callable[[dict], object]) -> Change:
    """Edit a record or a table of leaves and give it a fitting checksum."""

    def change(run: Path, outside: Path) -> None:
        path = where(run)
        data = read_json(path)
        edit(data)
        write_json(path, data)

    return change


def meta(edit: Callable[[dict], object]) -> Change:
    return forged(lambda run: item(run) / META, edit)


def progress(edit: Callable[[dict], object]) -> Change:
    return forged(record, lambda data: edit(data["progress"]))


def edited(name: str, edit: Callable[[dict], object]) -> Change:
    """Edit a plain JSON file of the run."""

    def change(run: Path, outside: Path) -> None:
        data = json.loads((run / name).read_text())
        edit(data)
        (run / name).write_text(json.dumps(data))

    return change


def replaced(name: str, old: str, new: str) -> Change:
    """Edit a text file of the run."""

    def change(run: Path, outside: Path) -> None:
        text = (run / name).read_text()
        assert text.count(old) == 1, f"{name} has not one {old!r}"
        (run / name).write_text(text.replace(old, new))

    return change


def fitting(change: Change) -> Change:
    """The same change by somebody who also writes the new digests of the files of the run into its records."""

    def both(run: Path, outside: Path) -> None:
        change(run, outside)
        for path in (run / "checkpoints" / "progress").glob("*.json"):
            data = read_json(path)
            data["progress"]["digests"] = digests(run)
            write_json(path, data)

    return both


def write_bomb(arrays: Path, names: list[str], use_ocdbt: bool) -> None:
    """Zeros as Orbax writes them, compressed: the first leaf is a gigabyte, the others are small."""
    import orbax.checkpoint as ocp

    tree: dict = {}
    for name in names:
        *parents, last = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = np.zeros(2**28 if name == min(names) else 1, np.float32)
    shutil.rmtree(arrays)
    handler = ocp.PyTreeCheckpointHandler(use_compression=True, use_ocdbt=use_ocdbt)
    ocp.Checkpointer(handler).save(arrays, args=ocp.args.PyTreeSave(tree))


def bomb(use_ocdbt: bool) -> Change:
    def change(run: Path, outside: Path) -> None:
        path = item(run)
        data = read_json(path / META)
        # In a process of its own: what this one takes would be counted for the commands that it starts.
        work = get_context("spawn").Process(target=write_bomb, args=(path / "arrays", list(data["leaves"]), use_ocdbt))
        work.start()
        work.join()
        files = {p.relative_to(path).as_posix(): p for p in (path / "arrays").rglob("*") if p.is_file()}
        data["files"] = {name: _file_digest(file) for name, file in files.items()}
        write_json(path / META, data)

    return change


def giant_chunk(run: Path, outside: Path) -> None:
    file = next(iter(sorted((item(run) / "arrays").glob("*/.zarray"))))
    described = json.loads(file.read_text())
    file.write_text(json.dumps(described | {"chunks": [10**6] * len(described["shape"])}))
    name = file.relative_to(item(run)).as_posix()
    meta(lambda data: data["files"].update({name: _file_digest(file)}))(run, outside)


def first_leaf(**values: object) -> Change:
    return meta(lambda data: data["leaves"][min(data["leaves"])].update(values))


DEEP = b"[" * 10**6
ALIASES = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else '1'}]\n" for i in range(12)).encode()
LINKS = {  # place -> commands that have to refuse it; others may leave it alone
    "checkpoints": EVERY,
    "checkpoints/stacks": EVERY,
    "checkpoints/stacks/001": EVERY,
    "ITEM": EVERY,
    "ITEM/arrays": EVERY,
    "ITEM/meta.json": EVERY,
    "checkpoints/stacks/009": ("train",),
    "checkpoints/stacks/00000099.tmp": ("train",),
    "checkpoints/progress": EVERY,
    "checkpoints/.lock": ("train",),
    "RECORD": ("train",),  # readers take the record before it
    "metrics.jsonl": ("train",),
    **dict.fromkeys(("summary.json", "summary.json.tmp", "metrics.jsonl.tmp", "tensorboard", "cache", "offload"), ()),
    **dict.fromkeys(("tokenizer", "rack.json", "config.yaml", "phases.json"), ()),
}
DESCRIPTION: dict[str, tuple[Change, Iterable[str]]] = {  # the digests in the records fit
    "phases.json: a name with an escape": (edited("phases.json", lambda phases: phases[0].update(name=ESCAPE)), ()),
    "phases.json: deep": (put("phases.json", DEEP), EVERY),
    "phases.json: 10^9 steps": (edited("phases.json", lambda phases: phases[1].update(steps=10**9)), ("train",)),
    "rack.json: deep": (put("rack.json", DEEP), LOADING),
    "rack.json: a vocabulary of 10^11": (edited("rack.json", lambda rack: rack.update(vocab_size=10**11)), LOADING),
    "rack.json: 1000000 blocks": (
        edited("rack.json", lambda rack: rack["stacks"][0]["blocks"][0].update(n_blocks=10**6)),
        LOADING,
    ),
    "rack.json: no stacks": (edited("rack.json", lambda rack: rack.update(stacks=[])), LOADING),
    "config.yaml: aliases": (put("config.yaml", ALIASES), EVERY),
    "config.yaml: deep": (put("config.yaml", DEEP), EVERY),
    "config.yaml: cut": (put("config.yaml", b"run: {seed: 1}\n"), EVERY),
    "config.yaml: 10^8 stacks": (replaced("config.yaml", "n_stacks: 2\n", "n_stacks: 100000000\n"), EVERY),
    "config.yaml: 10^9 tokens": (replaced("config.yaml", "seq_len: 16\n", "seq_len: 1000000000\n"), ("train",)),
    "config.yaml: an escape": (replaced("config.yaml", "  name: null\n", '  name: "\\e]0;stranger\\a"\n'), ()),
}
CASES: dict[str, tuple[Change, Iterable[str]]] = {
    "nothing changed": (lambda run, outside: None, ()),
    **{f"link: {place}": (link(place), refusing) for place, refusing in LINKS.items()},
    "a stray checkpoint file": (put("ITEM/arrays/checkpoint", b"\x80"), LOADING),
    "a pipe in an item": (pipe("ITEM/arrays/pipe"), LOADING),
    "a pipe for a record": (pipe("RECORD"), ()),
    "a pipe for metrics.jsonl": (pipe("metrics.jsonl"), ("train",)),
    "a pipe for rack.json": (pipe("rack.json"), LOADING),
    "a pipe for config.yaml": (pipe("config.yaml"), EVERY),
    "an absolute name": (meta(lambda data: data["files"].update({"/etc/passwd": "0" * 64})), EVERY),
    "a name that leaves": (meta(lambda data: data["files"].update({"../../../../x": "0" * 64})), EVERY),
    "a compressed database": (bomb(use_ocdbt=True), LOADING),
    "compressed chunks": (bomb(use_ocdbt=False), LOADING),
    "a giant chunk": (giant_chunk, LOADING),
    "a giant leaf": (first_leaf(shape=[10**6, 10**6]), LOADING),
    "a shape that overflows": (first_leaf(shape=[10**12, 10**12, 10**12, 0]), EVERY),
    "an unknown dtype": (first_leaf(dtype="float33"), EVERY),
    "meta.json: deep": (put("ITEM/meta.json", DEEP), EVERY),
    "meta.json: no table": (meta(lambda data: data.update(leaves=7)), EVERY),
    "meta.json: values": (meta(lambda data: data["meta"].update(values="x")), EVERY),
    "record: deep": (put("RECORD", DEEP), ()),
    "record: a version that leaves": (progress(lambda p: p["versions"].update({"../../x": 1})), ()),
    "record: a step below zero": (progress(lambda p: p.update(step=-1)), ()),
    "record: a step of 30 digits": (progress(lambda p: p.update(step=10**30)), ()),
    "record: no step": (progress(lambda p: p.pop("step")), ()),
    "record: a result without an index": (progress(lambda p: p["results"][0].pop("index")), ()),
    "record: a result without versions": (progress(lambda p: p["results"][0].pop("versions")), ()),
    "record: phase 1000000": (progress(lambda p: p.update(phase=10**6)), LOADING),
    "record: a result of phase 1000000": (progress(lambda p: p["results"][0].update(index=10**6)), ()),
    "record: no fingerprints": (progress(lambda p: p.update(data={})), LOADING),
    "record: no history": (progress(lambda p: p.update(extra={})), ("train",)),
    "record: no versions": (progress(lambda p: p.update(versions={})), ()),
    "record: a name with an escape": (progress(lambda p: p["results"][0].update(name=ESCAPE)), ()),
    "meta.json: a phase with an escape": (meta(lambda data: data["meta"].update(phase=ESCAPE)), ()),
    "config.yaml: a changed seed": (replaced("config.yaml", "  seed: 0\n", "  seed: 1\n"), EVERY),
    **{name: (fitting(change), refusing) for name, (change, refusing) in DESCRIPTION.items()},
}


@dataclass
class Outcome:
    case: str
    command: str
    code: int
    seconds: float
    bytes: int
    sentence: str
    faults: list[str]


def call(command: str, argv: list[str]) -> tuple[int, float, int, str, str]:
    """Run a command: its exit code, seconds, peak resident bytes and output. It is killed after SECONDS."""
    line = [sys.executable, "-m", f"stackwise_jax.{command}", *argv]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begun = time.perf_counter()
        process = subprocess.Popen(line, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=env)
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)  # the resident size of this child and not of the largest
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds, texts = time.perf_counter() - begun, []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    scale = 1 if sys.platform == "darwin" else 1024
    return process.returncode, seconds, usage.ru_maxrss * scale, texts[0], texts[1]


def content(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file()} | {
        str(p): b"" for p in directory.rglob("*") if p.is_dir()
    }


def try_case(base: Path, case: str, command: str) -> Outcome:
    """One command on a run that was changed as a case says."""
    change, refusing = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        run, outside = Path(folder, "run"), Path(folder, "outside")
        shutil.copytree(base, run)
        outside.mkdir()
        (outside / "canary").write_text("canary")
        change(run, outside)
        before = content(outside)
        code, seconds, n_bytes, out, err = call(command, COMMANDS[command](run))
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        faults = {
            "traceback": "Traceback" in err or "--debug" in err,
            "no sentence": code != 0 and len(said) != 1,
            "killed": code < 0,
            "accepted": code == 0 and command in refusing,
            "more than 1 GB": n_bytes > BYTES,
            "outside touched": content(outside) != before,
            "escape sequence": ESCAPE[:4] in out + err,
        }
        sentence = (said or [""])[0].removeprefix("error: ").replace(folder, "..")
        return Outcome(case, command, code, seconds, n_bytes, sentence, [name for name, bad in faults.items() if bad])


def make_base(directory: Path) -> Path:
    """A run that has reached the middle of its second and last phase."""
    run = directory / "run"
    code, *_, err = call("train", [*OPTIONS, f"--run.dir={run}"])
    if code:
        raise SystemExit(f"the run that all cases start from failed: {err}")
    record(run).unlink()
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--commands", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="one command on two cases")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cases = [case for case in CASES if any(part in case for part in args.only)]
    commands = args.commands
    if args.smoke:
        cases, commands = ["nothing changed", "a stray checkpoint file"], ["evaluate"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        base = make_base(Path(folder))
        tries = [pool.submit(try_case, base, case, command) for case in cases for command in commands]
        outcomes = []
        for future in tries:
            outcomes.append(one := future.result())
            marks = f"  FAULT: {', '.join(one.faults)}" if one.faults else ""
            figures = f"{one.code:4d} {one.seconds:5.1f} s {one.bytes / 1e6:6.0f} MB"
            print(f"{one.case:36.36s} {one.command:9s}{figures}  {one.sentence!r:.120s}{marks}", flush=True)
    bad = [outcome for outcome in outcomes if outcome.faults]
    print(f"{len(outcomes)} tries, {len(bad)} with faults, {max(o.bytes for o in outcomes) / 1e6:.0f} MB at most")
    if args.json:
        print(json.dumps({"tries": len(outcomes), "faults": [asdict(outcome) for outcome in bad]}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
