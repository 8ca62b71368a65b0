"""Do the tests see what is changed? Random one-token changes of the package, each run against the tests of its module.

    python experiments/trust/mutate.py --out mutants.jsonl [--n 100] [--seed 0] [--module 'engine/*'] [--tests FILE ..]

Works in a copy of the repository, never in the checkout. A line of --out is one change: killed (a test failed),
survived, or timeout. Run again with the same --out it goes on where it stopped. For each change it takes the quick
tests of the module: test files named after it, those that import it, and those that import what imports it, as many
as take --seconds together. A survivor is a hole in the tests, or a change that makes no difference: somebody has to
look.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mutations import Mutation, mutations

ROOT = Path(__file__).parents[2]
PACKAGE = "stackwise_jax"
COPIED = ("stackwise_jax", "tests", "configs", "docs", "experiments", "README.md", "pyproject.toml")
LEFT_OUT = ("*/bench.py", "*/arg_specs.py", "*/pallas/*", "*/measure.py", "*/cudnn.py")  # benchmarks; GPU only


def module_name(path: str) -> str:
    """stackwise_jax/engine/step.py -> stackwise_jax.engine.step"""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(path: Path) -> set[str]:
    """Names of our modules, and of what is imported from them, in a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith(PACKAGE)}


class Tests:
    """Which test files belong to a module, and how long each takes where nothing is changed.

    took: a JSON file that remembers the seconds of each test file, null for one that fails or is too slow.
    """

    def __init__(self, copy: Path, seconds: float, limit: float, took: Path):
        self._copy, self._seconds, self._limit, self._file = copy, seconds, limit, took
        self._imports = {path: imported(path) for path in (copy / "tests").glob("test_*.py")}
        self._package = {
            module_name(str(path.relative_to(copy))): imported(path) for path in (copy / PACKAGE).rglob("*.py")
        }
        self._took: dict[str, float | None] = json.loads(took.read_text()) if took.exists() else {}

    def of(self, module: str) -> list[str]:
        """The test files of a module, quick ones first, that take `seconds` together."""
        chosen, total = [], 0.0
        for path in self._ranked(module):
            took = self._baseline(path)
            if took is not None and (not chosen or total + took <= self._seconds):
                chosen.append((took, path))
                total += took
            if total > 0.8 * self._seconds:
                break
        return [path for _, path in sorted(chosen)]

    def _ranked(self, module: str) -> list[str]:
        """Named after the module, after its folder; importing it, or what imports it."""
        name = module.removeprefix(f"{PACKAGE}.")
        full, folder = name.replace(".", "_"), name.split(".")[0]
        users = {user for user, names in self._package.items() if module in names}

        def rank(path: Path) -> tuple[int, int]:
            names = self._imports[path]
            if path.stem.startswith(f"test_{full}") or path.stem.startswith(f"test_{name.split('.')[-1]}"):
                return 0, path.stat().st_size
            if module in names:
                return 1, path.stat().st_size
            if names & users and path.stem.startswith(f"test_{folder}"):
                return 2, path.stat().st_size
            return (3 if names & users else 9), path.stat().st_size

        ranked = sorted(self._imports, key=rank)
        return [f"tests/{path.name}" for path in ranked if rank(path)[0] < 9]

    def _baseline(self, path: str) -> float | None:
        if path not in self._took:
            start = time.perf_counter()
            code = run_tests(self._copy, [path], self._limit)
            took = time.perf_counter() - start
            self._took[path] = took if code == 0 else None
            self._file.write_text(json.dumps(self._took, indent=1))
            print(
                f"  unchanged {path}: {took:.0f} s{'' if code == 0 else f', left out (exit code {code})'}", flush=True
            )
        return self._took[path]


def run_tests(copy: Path, files: list[str], limit: float) -> int | None:
    """The exit code of pytest in the copy; None: it took too long."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *files]
    # No bytecode: that of a changed file of equal size and second would be taken for the unchanged one's.
    env = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, cwd=copy, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            return process.wait(limit)
        except BaseException as error:  # Ctrl-C too leaves no process behind
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise


def candidates(copy: Path, pattern: str, seed: int) -> Iterator[tuple[str, Mutation]]:
    """Changes in random order, a file being as likely as its lines are many."""
    paths = [str(path.relative_to(copy)) for path in sorted((copy / PACKAGE).rglob("*.py"))]
    paths = [p for p in paths if fnmatch.fnmatch(p.removeprefix(f"{PACKAGE}/"), pattern)]
    paths = [p for p in paths if not any(fnmatch.fnmatch(p, left_out) for left_out in LEFT_OUT)]
    all_of_them = [(path, m) for path in paths for m in mutations((copy / path).read_bytes())]
    random.Random(seed).shuffle(all_of_them)
    yield from all_of_them


def try_one(copy: Path, path: str, change: Mutation, files: list[str], limit: float) -> dict[str, Any]:
    """Apply a change, run the tests, and take it back."""
    source = (copy / path).read_bytes()
    changed = change.apply(source)
    start = time.perf_counter()
    try:
        compile(changed, path, "exec")
        (copy / path).write_bytes(changed)
        code = run_tests(copy, files, limit)
    except SyntaxError:
        code = 1
    finally:
        (copy / path).write_bytes(source)
    result = "timeout" if code is None else "survived" if code == 0 else "killed"
    return {"result": result, "seconds": round(time.perf_counter() - start, 1)}


def key_of(path: str, change: Mutation) -> str:
    """What identifies a change in --out, whatever was added to the file above it."""
    return f"{path}:{change.line}:{change.kind}:{change.old} -> {change.new}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a JSONL file, which is continued")
    parser.add_argument("--n", type=int, default=100, help="changes in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", default="*", help="a pattern of paths within the package, such as 'engine/*'")
    parser.add_argument("--tests", nargs="*", help="these test files instead of those of each module")
    parser.add_argument("--seconds", type=float, default=40.0, help="of tests for each change")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a run of tests is given up")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {entry["key"] for entry in done}
    with tempfile.TemporaryDirectory(prefix="mutate-") as directory:
        copy = Path(directory)
        for name in COPIED:
            copier = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copier(ROOT / name, copy / name)
        tests = Tests(copy, args.seconds, args.limit, args.out.with_suffix(".seconds.json"))
        for path, change in candidates(copy, args.module, args.seed):
            if len(done) >= args.n:
                break
            if (key := key_of(path, change)) in known:
                continue
            files = args.tests or tests.of(module_name(path))
            found = try_one(copy, path, change, files, args.limit) if files else {"result": "survived", "seconds": 0}
            done.append({"key": key, "module": path, **found, "tests": files})
            with args.out.open("a") as out:
                out.write(json.dumps(done[-1]) + "\n")
            print(f"{len(done)}/{args.n} {found['result']:9} {found['seconds']:6.1f} s  {key}", flush=True)
    counts = Counter(entry["result"] for entry in done)
    print("\n" + "\n".join(f"{entry['key']}" for entry in done if entry["result"] == "survived"))
    print(", ".join(f"{n} {result}" for result, n in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
