"""The shape of the code: which way imports go, how long things get, and what is never done."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "stackwise_jax"
FILES = sorted(p for top in (PACKAGE, "tests", "experiments") for p in (ROOT / top).rglob("*.py"))
OURS = [path for path in FILES if path.is_relative_to(ROOT / PACKAGE)]

GROUPS = (  # a package imports from groups left of its own; commands are the modules of the top level
    ("config", "curriculum"),
    ("objectives", "kernels", "memory"),
    ("model",),
    ("adapters",),
    ("data", "checkpoint"),
    ("engine",),
    ("sampling", "evaluation", "reporting"),
)
BASE = ("errors", "files", "random_streams")  # all may import these, and they import nothing of ours
WITHIN = {("curriculum", "config")}  # phases hold settings of the schema
SLOW_TO_IMPORT = {"grain", "orbax", "sentencepiece", "tensorboardX"}
UNPICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_YAML = {"unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "Loader", "UnsafeLoader", "FullLoader"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(tree: ast.AST, package: str) -> Iterator[tuple[str, ast.stmt]]:
    """All absolute names that a file imports, wherever in it; `package` resolves relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node) for alias in node.names)


def imports_of(path: Path) -> list[tuple[str, ast.stmt]]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return list(imported(ast.parse(path.read_text()), package))


def rank(room: str) -> int:
    return next((i for i, group in enumerate(GROUPS) if room in group), len(GROUPS))


def may_import(importer: str, target: str) -> bool:
    """Whether a room (a folder of the package, or a module of its top level) may import from another."""
    if importer == target or target in BASE or (importer, target) in WITHIN:
        return True
    return importer not in BASE and rank(target) < rank(importer)


def wrong_arrows(path: Path) -> list[str]:
    importer = path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
    targets = {name.split(".")[1] for name, _ in imports_of(path) if name.startswith(f"{PACKAGE}.")}
    return sorted(f"{importer} -> {target}" for target in targets if not may_import(importer, target))


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_imports_go_one_way(path):
    assert wrong_arrows(path) == []


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_foreign_packages_stay_in_their_rooms(path):
    room = path.relative_to(ROOT / PACKAGE).parts[0]
    roots = {name.split(".")[0] for name, _ in imports_of(path)}
    assert room == "model" or "flax" not in roots, "only model/ knows flax"
    assert room not in ("config", "curriculum") or not roots & {"jax", "jaxlib", "optax"}, f"{room} is pure data"
    assert not roots & {"tests", "experiments"}, "tests and experiments use the package, never the reverse"
    pallas = [name for name, _ in imports_of(path) if name.startswith("jax.") and "pallas" in name]
    assert path.parent == ROOT / PACKAGE / "kernels" / "pallas" or not pallas, "only kernels/pallas knows pallas"


def runs_at_import(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.stmt):
            yield node
        yield from runs_at_import(node)


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_slow_packages_are_imported_where_they_are_used(path):
    at_import = set(runs_at_import(tree := ast.parse(path.read_text())))
    early = {name.split(".")[0] for name, node in imported(tree, PACKAGE) if node in at_import}
    assert not early & SLOW_TO_IMPORT


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    functions = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    assert [f.name for f in functions if (f.end_lineno or f.lineno) - f.lineno + 1 > 60] == []


def test_pallas_is_not_imported_before_it_is_used():
    code = "import sys, stackwise_jax.model, stackwise_jax.kernels.feature_attention; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = done.stdout.split()
    assert "stackwise_jax.kernels.pallas" in loaded
    assert [name for name in loaded if name.startswith("jax.experimental.pallas")] == []


def safe_loaders(tree: ast.AST) -> set[str]:
    """The YAML loaders that build plain values only: yaml's safe one and those that a file derives from it."""
    safe = {"yaml.SafeLoader"}
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return safe | {node.name for node in classes if {ast.unparse(base) for base in node.bases} & safe}


def unsafe_things(tree: ast.AST) -> list[str]:
    """What would run code that somebody put into a file."""
    names = [name for name, _ in imported(tree, "")]
    found = [n for n in names if n.split(".")[0] in UNPICKLES or n.removeprefix("yaml.") in UNSAFE_YAML]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node).removeprefix("yaml.") in UNSAFE_YAML:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in ("eval", "exec") or given.get("allow_pickle", "False") != "False":
                found.append(called)
            if called in ("yaml.load", "yaml.load_all") and given.get("Loader") not in safe_loaders(tree):
                found.append(called)
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_runs_code_from_files(path):
    assert unsafe_things(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    ("importer", "target", "allowed"),
    [
        ("engine", "model", True),
        ("train", "reporting", True),
        ("curriculum", "config", True),
        ("memory", "errors", True),
        ("model", "model", True),
        ("config", "curriculum", False),
        ("adapters", "model", True),
        ("model", "adapters", False),
        ("model", "engine", False),
        ("data", "checkpoint", False),
        ("engine", "reporting", False),
        ("reporting", "evaluation", False),
        ("reporting", "train", False),
        ("train", "evaluate", False),
        ("errors", "config", False),
        ("config", "files", True),
        ("model", "random_streams", True),
        ("files", "config", False),
        ("random_streams", "model", False),
    ],
)
def test_the_arrows_are_those_of_the_design(importer, target, allowed):
    assert may_import(importer, target) is allowed


def test_imports_are_found_wherever_they_stand():
    code = (
        "def f():\n    from stackwise_jax.engine import run\n    from ..data import loader\nimport flax.linen as nn\n"
    )
    names = [name for name, _ in imported(ast.parse(code), f"{PACKAGE}.model")]
    assert sorted(names) == ["flax.linen", "stackwise_jax.data.loader", "stackwise_jax.engine.run"]


def test_a_loader_derived_from_the_safe_one_is_safe():
    assert unsafe_things(ast.parse("class L(yaml.SafeLoader): ...\nyaml.load(text, Loader=L)")) == []


@pytest.mark.parametrize(
    "code",
    [
        "from pickle import loads",
        "import cloudpickle",
        "yaml.load(text, Loader=yaml.Loader)",
        "class L(yaml.FullLoader): ...",
        "yaml.load(text)",
        "from yaml import UnsafeLoader",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_unsafe_code_is_seen(code):
    assert unsafe_things(ast.parse(code))
