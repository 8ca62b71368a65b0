"""Do the tests see what is changed? Random one-token changes of the package, each run against the tests of its module.

    python experiments/trust/mutate.py --out mutants.jsonl [--n 100] [--seed 0] [--module 'engine/*'] [--tests FILE ..]

Works in a copy of the repository, never in the checkout. A line of --out is one change: killed (a test failed),
survived, or timeout. Run again with the same --out it goes on where it stopped. For each change it takes the quick
tests of the first --files test files: those named after the module, those that import it, and those that import what
imports it. A survivor is a hole in the tests, or a change that makes no difference: somebody has to look.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
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
    """Which test files belong to a module, and what they say of a changed copy."""

    def __init__(self, copy: Path, files: int, limit: float):
        self._copy, self._files, self._limit = copy, files, limit
        self._imports = {path: imported(path) for path in (copy / "tests").glob("test_*.py")}
        self._package = {
            module_name(str(path.relative_to(copy))): imported(path) for path in (copy / PACKAGE).rglob("*.py")
        }
        self._passes: dict[str, bool] = {}  # whether a test passes where nothing is changed

    def of(self, module: str) -> list[str]:
        """Test files named after the module, of its folder, importing it, then those that import what imports it."""
        name = module.removeprefix(f"{PACKAGE}.")
        folder, last = name.split(".")[0], name.split(".")[-1]
        users = self._users(module)

        def rank(path: Path) -> int:
            names = self._imports[path]
            if path.stem.startswith((f"test_{name.replace('.', '_')}", f"test_{folder}_{last}", f"test_{last}")):
                return 0
            if path.stem.startswith(f"test_{folder}") and names & {module, *users}:
                return 1
            return 2 if module in names else 3 if names & users else 9

        ranked = sorted((rank(path), path.stat().st_size, path) for path in self._imports)
        return [f"tests/{path.name}" for place, _, path in ranked if place < 9][: self._files]

    def _users(self, module: str) -> set[str]:
        """The modules that import a module; while no test imports one of them, those that import these too."""
        users: set[str] = set()
        while True:
            more = {user for user, names in self._package.items() if names & {module, *users}}
            if more == users or any(names & more for names in self._imports.values()):
                return more
            users = more

    def result(self, files: list[str], change: Callable[[], AbstractContextManager]) -> dict[str, Any]:
        """killed, with the test that failed; survived; or timeout where no file came to its end.

        change: a context in which the copy is changed. A test that fails without the change too is left out.
        """
        slow = []
        for file in files:
            while True:
                with change():
                    failed = self._failed([file])
                if failed == "timeout":
                    slow.append(file)
                elif failed is not None and self._passes_unchanged(failed):
                    return {"result": "killed", "by": failed}
                if failed in (None, "timeout"):
                    break
        return {"result": "timeout" if files and slow == files else "survived", "tests": files, "slow": slow}

    def _passes_unchanged(self, test: str) -> bool:
        if test not in self._passes:
            self._passes[test] = self._failed([test]) is None
        return self._passes[test]

    def _failed(self, tests: list[str]) -> str | None:
        """The first test that fails, "timeout", or None."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-m", "not slow", "-p", "no:cacheprovider"]
        command += [f"--deselect={test}" for test, passes in self._passes.items() if not passes]
        # No bytecode: that of a changed file of equal size and second would be taken for the unchanged one's.
        env = os.environ | {"PYTHONPATH": str(self._copy), "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
        with subprocess.Popen(
            [*command, *tests], cwd=self._copy, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                output, _ = process.communicate(timeout=self._limit)
            except BaseException as error:  # Ctrl-C too leaves no process behind
                os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    return "timeout"
                raise
        if process.returncode in (0, 5):  # 5: every test of the file is slow
            return None
        found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        return found[1] if found else tests[0]


def candidates(copy: Path, pattern: str, seed: int) -> Iterator[tuple[str, Mutation]]:
    """Changes in random order, a file being as likely as its lines are many."""
    paths = [str(path.relative_to(copy)) for path in sorted((copy / PACKAGE).rglob("*.py"))]
    paths = [p for p in paths if fnmatch.fnmatch(p.removeprefix(f"{PACKAGE}/"), pattern)]
    paths = [p for p in paths if not any(fnmatch.fnmatch(p, left_out) for left_out in LEFT_OUT)]
    all_of_them = [(path, m) for path in paths for m in mutations((copy / path).read_bytes())]
    random.Random(seed).shuffle(all_of_them)
    yield from all_of_them


@contextmanager
def changed(path: Path, change: Mutation) -> Iterator[None]:
    """A file with the change in it, for a while."""
    source = path.read_bytes()
    try:
        path.write_bytes(change.apply(source))
        yield
    finally:
        path.write_bytes(source)


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
    parser.add_argument("--files", type=int, default=4, help="test files for each change")
    parser.add_argument("--again", action="store_true", help="first try again what was not killed (with more --files)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a test file is given up")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.again:
        done = [entry for entry in done if entry["result"] == "killed"]
        args.out.write_text("".join(json.dumps(entry) + "\n" for entry in done))
    known = {entry["key"] for entry in done}
    with tempfile.TemporaryDirectory(prefix="mutate-") as directory:
        copy = Path(directory)
        for name in COPIED:
            copier = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copier(ROOT / name, copy / name)
        tests = Tests(copy, args.files, args.limit)
        for path, change in candidates(copy, args.module, args.seed):
            if len(done) >= args.n:
                break
            if (key := key_of(path, change)) in known:
                continue
            start = time.perf_counter()
            files = args.tests or tests.of(module_name(path))
            found = tests.result(files, partial(changed, copy / path, change))
            found["seconds"] = round(time.perf_counter() - start, 1)
            done.append({"key": key, **found})
            with args.out.open("a") as out:
                out.write(json.dumps(done[-1]) + "\n")
            print(f"{len(done)}/{args.n} {found['result']:9} {found['seconds']:6.1f} s  {key}", flush=True)
    counts = Counter(entry["result"] for entry in done)
    print("\n" + "\n".join(f"{entry['key']}" for entry in done if entry["result"] == "survived"))
    print(", ".join(f"{n} {result}" for result, n in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
