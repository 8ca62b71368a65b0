"""README and docs say what is there: every command, key, option, link, path and name in them exists.

Run as a program, this file writes docs/configuration.md anew: python3 tests/test_docs.py
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import runpy
import shlex
import tomllib
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from stackwise_jax.config import load_config, validate
from stackwise_jax.config.keys import describe, list_keys, list_names
from stackwise_jax.config.schema import (
    AdapterRow,
    PhaseConfig,
    PlanConfig,
    PlanEntryConfig,
    StackWiseConfig,
    StageConfig,
)
from stackwise_jax.curriculum import PLANS, format_phase_table, make_plan, plans
from stackwise_jax.engine import entries
from stackwise_jax.engine.shape import rack_shape
from stackwise_jax.model import PRESETS, create_rack_from_config

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "stackwise_jax"
README, CONFIGURATION = ROOT / "README.md", ROOT / "docs" / "configuration.md"
PAGES = sorted([README, *(ROOT / "docs").glob("*.md")])
COMMANDS = ("train", "evaluate", "generate", "inspect", "convert", "plan")
RUN_ENTRIES = {
    "rack.json",
    *(entries.CONFIG, entries.PHASES, entries.METRICS, entries.SUMMARY, entries.TOKENIZER),
    *(entries.CHECKPOINTS, entries.TENSORBOARD, entries.CACHE, entries.OFFLOAD),
}
IN_A_STORE = r"(embed|head|stacks/\d{3}|adapters/\d{3}/\w+|moments|optimizer|progress|arrays|meta\.json)\b"
ENTRIES = {
    "curriculum.phases": PhaseConfig,
    "curriculum.stages": StageConfig,
    "curriculum.plans": PlanEntryConfig,
    "curriculum.adapters.table": AdapterRow,
}
GENERATED = "<!-- written by tests/test_docs.py from stackwise_jax/config/schema.py -->"


READING = """\
A YAML file holds only what differs from these defaults. `--config` may be repeated: files merge in order,
sections key by key and lists as a whole. `--section.key value` changes any key on the command line, where
the last value counts, and `--print_config` prints the result.

Files are read by the core schema of YAML 1.2, and the command line gives the same text the same value:
`010` is ten, `0o10` is eight, `1e-4` is a number; only `true` and `false` are such, and `yes`, `1:30` or
`1_000` are text. A key for text takes what is written, but `null` where it may be null; quotes make text of
everything, also on the command line inside those of the shell: `--run.name='"null"'`. Anchors, tags, merge keys
and second documents are not read. `~` begins a path in the home directory, and alone on the command line it is
that directory; alone in a file it is null. A section or a list with nothing below it is left out. Files of
at most 16 MiB are read, and a run writes none that is larger.

What is written and has no effect under the chosen setting is named in a line on stderr before anything
begins, for instance `note: objective.mask_fraction has no effect under objective.kind clm`. So is what a later
file or the command line replaces of an earlier file: `note: model.d_model 32 of B.yaml counts, not 64 of A.yaml`.

Values larger than anybody can mean are refused (`stackwise_jax/config/bounds.py`), and names of other programs
are answered with the key here (`stackwise_jax/config/synonyms.py`).
"""


def configuration_page() -> str:
    """The text of docs/configuration.md: every key with its type, default and comment."""
    lines = [GENERATED, "# Configuration", "", *READING.splitlines(), ""]
    sections: dict[str, list] = {}
    for key in list_keys():
        sections.setdefault(key.name.split(".")[0], []).append(key)
    for name, keys in sections.items():
        lines += [f"## {name}", "", type(getattr(StackWiseConfig(), name)).__doc__.split("\n")[0], "", *_table(keys)]
    for name, entry in ENTRIES.items():
        lines += [f"## Entries of {name}", "", (entry.__doc__ or "").replace("None: ", "null: "), ""]
        own = {field.name for field in dataclasses.fields(PlanConfig)} if entry is PlanEntryConfig else set()
        if own:
            lines += ["The keys of the section curriculum (but for budget and plans), and:", ""]
        lines += _table([key for key in list_keys(entry) if key.name.split(".")[0] not in own])
    return "\n".join(lines).rstrip() + "\n"


def _table(keys: list) -> list[str]:
    rows = ["| key | write | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        section = key.name in ("objective", "optimizer")
        kind = f"keys of the section {key.name}, or null" if section else describe(key.hint)
        comment = re.sub(r"([*<|])", r"\\\1", key.comment.replace("None: ", "null: "))
        rows.append(f"| `{key.name}` | {kind} | `{json.dumps(key.default)}` | {comment} |")
    return [*rows, ""]


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """What stands between backticks outside of fenced blocks."""
    return re.findall(r"`([^`]+)`", prose(page))


def first_block(heading: str) -> list[str]:
    """The lines of the first fenced block after the heading that contains these words, without comments."""
    after = re.split(rf"^#+.*{heading}.*$", README.read_text(), maxsplit=1, flags=re.MULTILINE)[1]
    block = re.search(r"^```\w*\n(.*?)^```", after, re.MULTILINE | re.DOTALL)
    assert block
    return [line for line in block[1].splitlines() if line.strip() and not line.strip().startswith("#")]


def command_lines(page: Path) -> list[str]:
    lines = "\n".join(fences(page, "bash")).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if "stackwise_jax" in part]


@cache
def parser_of(command: str):
    return importlib.import_module(f"stackwise_jax.{command}").build_parser()


@cache
def options() -> set[str]:
    """Every option of every command."""
    found = {name for command in COMMANDS for name in parser_of(command)._option_string_actions}
    return found | {f"--{name}" for name in list_names()}


@cache
def sources() -> str:
    return "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("heading", ["Quick start", "Tests"])
def test_the_first_block_is_one_command_that_installs_and_runs(heading):
    (line,) = first_block(heading)
    install, run = line.split(" && ")
    assert install.startswith("python3 -m pip install -q ")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all(extra in extras for extra in re.findall(r"\[(\w+)\]", install))
    assert run.startswith("python3 -m ")


COMMAND_LINES = [line for page in PAGES for line in command_lines(page)]


def test_each_command_is_shown():
    assert {command for command in COMMANDS if any(f"stackwise_jax.{command} " in line for line in COMMAND_LINES)} == {
        *COMMANDS
    }


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_can_be_run(line):
    words = shlex.split(line)
    start = next(i for i, word in enumerate(words) if word.startswith("stackwise_jax."))
    assert words[start - 2 : start] == ["python3", "-m"]
    command = words[start].removeprefix("stackwise_jax.")
    args = parser_of(command).parse_args(words[start + 1 :])
    if command == "train":
        load_config([ROOT / file for file in args.config], args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_and_keys_exist(page):
    foreign = {"--section.key", "--xla_force_host_platform_device_count"}
    used = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", prose(page) + "\n".join(COMMAND_LINES)))
    assert used - foreign <= options()
    sections = "|".join(name for name in list_names() if "." not in name)
    keys = {match[0] for span in spans(page) if (match := re.match(rf"({sections})\.\w[\w.]*", span))}
    files = {key for key in keys if (PACKAGE / key).exists() or key in RUN_ENTRIES}
    assert keys - files <= set(list_names())


YAML_BLOCKS = [block for page in PAGES for block in fences(page, "yaml")]


@pytest.mark.parametrize("block", YAML_BLOCKS)
def test_yaml_blocks_make_a_plan(block, tmp_path):
    (tmp_path / "config.yaml").write_text(block)
    config = load_config(tmp_path / "config.yaml")
    validate(config)
    rack = create_rack_from_config(config, vocab_size=260)
    assert make_plan(config, rack_shape(rack, config.data)).phases


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def looks_like_a_path(span: str) -> bool:
    return bool(re.fullmatch(r"\.?[\w-]+(/[\w.-]+)*(/|\.(py|yaml|md|toml|jsonl|json))|\.?[\w-]+(/[\w.-]+)+", span))


def exists(span: str) -> bool:
    if (ROOT / span).exists() or (PACKAGE / span).exists():
        return True
    first = span.rstrip("/").split("/")[0]
    return first in RUN_ENTRIES or first == "runs" or bool(re.match(IN_A_STORE, span))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    assert [span for span in spans(page) if looks_like_a_path(span) and not exists(span)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != CONFIGURATION], ids=lambda page: page.name)
def test_names_of_the_code_exist(page):
    """Spans that look like identifiers: CamelCase, ALL_CAPS, or with an underscore."""
    names = {span for span in spans(page) if re.fullmatch(r"[A-Za-z_]\w*", span)}
    names = {name for name in names if "_" in name or re.search(r"[A-Z]", name)} - {"LICENSE", "stackwise_jax"}
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", sources())] == []


def table_after(heading: str) -> list[str]:
    """The code spans in the first column of the first table after a heading of the README."""
    after = re.split(rf"^#+ {heading}$", README.read_text(), maxsplit=1, flags=re.MULTILINE)[1]
    rows = re.search(r"^\|.*?\n(?!\|)", after, re.MULTILINE | re.DOTALL)
    assert rows
    cells = [row.split("|")[1] for row in rows[0].splitlines()[2:]]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def choices(name: str) -> set[str]:
    hint = next(key.hint for key in list_keys() if key.name == name)
    return set(hint.__args__)


def test_tables_are_complete():
    assert set(table_after("Plans")) == set(plans.PLANS) == choices("curriculum.plan")
    assert set(table_after("Objectives")) == choices("objective.kind")
    assert set(table_after("Attention presets")) == set(PRESETS)
    assert {name.rstrip("/") for name in table_after("What a run directory holds")} == RUN_ENTRIES
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert {name.rstrip("/") for name in table_after("Where things live")} == rooms


def test_every_config_is_named():
    named = set(re.findall(r"configs/[\w.-]+\.yaml", README.read_text()))
    assert named == {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}


def test_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name for page in PAGES for name in re.findall(r"'\.\[(\w+)\]'", page.read_text())} <= set(extras)


def test_configuration_page_is_that_of_the_schema():
    assert CONFIGURATION.read_text() == configuration_page(), "run python3 tests/test_docs.py"


def snippet(page: Path, start: str) -> str:
    (block,) = [block for block in fences(page, "python") if block.startswith(start)]
    return block


def run_snippet(page: Path, start: str, names: dict) -> dict:
    """The names that exist once the snippet has run in the current directory with these names."""
    Path("snippet.py").write_text(snippet(page, start))
    return runpy.run_path("snippet.py", init_globals=names)


def test_plan_of_the_readme_is_a_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = "stackwise_jax/curriculum/plans.py"
    given = {name: value for name, value in vars(plans).items() if not name.startswith("__")}
    names = run_snippet(README, f"# {path}\n", given)
    config = StackWiseConfig()
    kind = PLANS.pop("interleave")
    assert kind.make is names["interleave"]
    plan = kind.make(plans.config_shape(config), config)
    assert [sorted(phase.train) for phase in plan.phases] == [[0, 2], [1, 3]]
    assert plan.stack_sizes == (2, 2, 2, 2)


TINY = """
data: {source: synthetic, synthetic_tokens: 2000, seq_len: 16, batch_size: 2}
model: {d_model: 32, n_heads: 2, d_ff: 64, architecture: {n_stacks: 2, blocks_per_stack: 1}}
curriculum: {steps: 2}
run: {eval_batches: 1}
"""


@pytest.mark.slow
def test_python_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text(TINY)
    names = run_snippet(README, "from pathlib", {})
    assert names["logits_BTV"].shape == (1, 16, 384)
    assert [phase["name"] for phase in names["summary"]["phases"]] == ["stack 0", "stack 1"]
    assert {entry.name for entry in Path("runs/from_python").iterdir()} <= RUN_ENTRIES

    names = run_snippet(ROOT / "docs" / "attention.md", "from stackwise_jax", names)
    np.testing.assert_allclose(names["weights_BHTT"].sum(-1), 1.0, rtol=1e-5)
    names = run_snippet(ROOT / "docs" / "checkpoints.md", "from stackwise_jax", names)
    assert set(names["stack"]["blocks"]) == {"attn_norm", "attn", "mlp_norm", "mlp"}


if __name__ == "__main__":
    CONFIGURATION.write_text(configuration_page())


TABLE = re.compile(r"^<!-- (--curriculum.plan [^\n]*) -->\n```text\n(.*?)\n```", re.MULTILINE | re.DOTALL)


def test_the_phase_tables_of_the_docs_are_those_of_the_plans():
    """After a change of plans, the tables in docs/curricula.md are what `format_phase_table` gives for four stacks."""
    tables = TABLE.findall((ROOT / "docs" / "curricula.md").read_text())
    assert len(tables) >= 10
    for options, table in tables:
        config = load_config(None, ["--model.architecture.n_stacks=4", *options.split()])
        validate(config)
        assert table == plans_table(config), options


def plans_table(config) -> str:
    return format_phase_table(make_plan(config)).split("\n", 1)[1]
