"""The tables of docs/memory.md say what the planner says."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from stackwise_jax.plan import build_parser, plan

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "memory.md").read_text()
PLACES = ("device", "host", "disk")
GB = 1e9


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table whose first column is headed so."""
    lines = TEXT[TEXT.index(f"\n| {heading} |") :].strip().split("\n")
    table = lines[2 : next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("row", rows("memory"), ids=lambda row: " ".join(row[1:3]))
def test_settings_need_what_the_table_says_and_fit(row, capsys):
    memory, device, file, options, _, *said = row
    line = ["--config", str(ROOT / file), "--device", device, "--host", "2TB", "--disk", "4TB", *options.split()]
    answer = plan(build_parser().parse_args(line))
    assert answer["fits"] and answer["peak_device_bytes"] < float(re.match(r"\d+", memory)[0]) * GB
    for place, size in zip(PLACES, said, strict=True):
        assert answer[f"peak_{place}_bytes"] / GB == pytest.approx(float(size), rel=0.02, abs=0.06)


def test_ways_of_the_picture_need_what_the_table_says(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    picture = importlib.import_module("memory_picture")
    table = {name: [float(size) for size in sizes] for name, *sizes in rows("way")}
    assert table.keys() == picture.WAYS.keys()
    for name, said in table.items():
        found = picture.places_of("llama_7b_24gb.yaml", picture.WAYS[name], [])
        assert [sum(found[place].values()) / GB for place in PLACES] == pytest.approx(said, rel=0.02, abs=0.06)
