"""The progress record: how far a run has come, and which saved items that state consists of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stackwise_jax.checkpoint import fields
from stackwise_jax.checkpoint.fields import Wrong, expect, is_count, is_item, is_number, is_table, is_text
from stackwise_jax.checkpoint.files import read_json, write_json
from stackwise_jax.errors import RunError

# Raised whenever an older program could misread a record. Format 2 has `digests`: the program that knows format 1 only
# would go on without comparing them. Records of format 1 are read as they are; they have no digests to compare.
FORMAT = 2
READABLE = (1, 2)


@dataclass(frozen=True)
class Progress:
    """One committed state of a run. Everything in it is plain JSON data."""

    number: int  # records are counted; each has a higher number than all before
    phase: int  # index into the phase table
    step: int  # the next step to run within the phase
    global_step: int  # steps run so far over all phases
    versions: dict[str, int]  # item name -> version
    formats: dict[str, str] = field(default_factory=dict)  # item name -> format, as it was last used
    data: dict = field(default_factory=dict)  # state of the data iterator
    metrics_bytes: int = 0  # length of metrics.jsonl at this moment
    results: list[dict] = field(default_factory=list)  # of the phases that have ended; "versions": as they were then
    bad_steps: int = 0  # non-finite steps in a row
    finished: bool = False
    extra: dict = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)  # file of the run, relative to its directory -> sha256 in hex

    @property
    def needed(self) -> set[tuple[str, int]]:
        """The (item name, version) pairs that must stay: this state's, and for each path those that the last phase
        which took it names in `versions`, so that the rack can still be loaded as it was then."""
        path = lambda result: tuple(result.get("path", [result.get("depth")]))  # older records name the depth only
        by_path = {path(result): result["versions"] for result in self.results if "versions" in result}
        return {pair for table in (self.versions, *by_path.values()) for pair in table.items()}


def write_progress(path: Path, progress: Progress) -> None:
    """Write a record atomically.

    Raises:
        RunError: it could not be read again; nothing was written.
        OSError: the disk does not take it.
    """
    data = dataclasses.asdict(progress)
    _read(path, json.loads(json.dumps(data)))
    write_json(path, {"format": FORMAT, "progress": data})


def read_progress(path: Path) -> Progress:
    """Read a record.

    Raises:
        RunError: the file is missing or damaged, or a newer version of the program wrote it.
    """
    data = read_json(path)
    if data.get("format") not in READABLE:
        found = str(data.get("format"))[:20]
        raise RunError(f"{path} has format {found}; this program reads formats 1 to {FORMAT}: use the newer one")
    return _read(path, data.get("progress"))


def _read(path: Path, data: Any) -> Progress:
    """The record from its JSON data. Raises RunError, which names `path`, when a field is missing or wrong."""
    try:
        expect(isinstance(data, dict), "progress", data)
        progress = Progress(**data)
        _check(progress)
    except (Wrong, TypeError) as error:
        raise RunError(f"{path} is damaged: {str(error).replace('Progress.__init__()', 'the record')}") from error
    return progress


def check_goes_on(progress: Progress, n_phases: int, where: Path) -> None:
    """Check that a record has what a run of `n_phases` phases takes from it when it is loaded or goes on.

    Raises:
        RunError: something is missing or names a phase that there is not; the sentence names `where`.
    """
    ended = progress.step == 0 and bool(progress.results)
    needs = {
        "data": ("fingerprint", "held_out", "tokenizer"),
        "versions": ("embed", "head"),
        "extra": tuple(IN_EXTRA) if progress.step else (),
    }
    absent = [
        f"{field}.{name}" for field, names in needs.items() for name in names if name not in getattr(progress, field)
    ]
    if ended and not progress.results[-1].get("versions"):
        absent.append(f"results[{len(progress.results) - 1}].versions")
    highest = max([progress.phase - (progress.step == 0), *(r.get("index", 0) for r in progress.results)])
    if absent or highest >= n_phases:
        what = f"has no {absent[0]}" if absent else f"names phase {highest} of {n_phases}"
        remedy = "remove it to go on from the one before, or use another run.dir"
        raise RunError(f"record {progress.number} of {where} is damaged: it {what}; {remedy}")


_is_versions = partial(is_table, key=is_item, entry=partial(is_count, most=fields.LAST_VERSION))
_is_formats = partial(is_table, key=is_item, entry=fields.is_format)
_is_mapping = lambda value: isinstance(value, dict)

_NUMBERS = ("held_out_loss", "bits_per_byte", "tokens", "flops", "seconds")
_MORE = ("accuracy", "trainable_params", "frozen_params", "skipped_steps", "peak_device_bytes", "peak_host_bytes")
REQUIRED = ("index", "name", "formats", *_NUMBERS)  # in the result of a phase that can still be loaded

Checks = dict[str, Callable[[Any], bool]]
FIELDS: Checks = {
    **dict.fromkeys(("phase", "step", "global_step", "metrics_bytes", "bad_steps"), is_count),
    "number": partial(is_count, most=fields.LAST_VERSION),
    "versions": _is_versions,
    "formats": _is_formats,
    "data": _is_mapping,
    "results": partial(fields.is_list, entry=_is_mapping),
    "finished": lambda value: isinstance(value, bool),
    "extra": _is_mapping,
    "digests": partial(is_table, key=fields.is_file, entry=fields.is_digest),
}
IN_RESULTS: Checks = {
    **dict.fromkeys((*_NUMBERS, *_MORE), is_number),
    "index": is_count,
    "name": is_text,
    "depth": is_count,
    "path": partial(fields.is_list, entry=is_count),
    "versions": _is_versions,
    "formats": _is_formats,
    "cache_bytes": partial(is_table, key=is_text, entry=is_number),
}
IN_EXTRA: Checks = {
    "seconds": lambda value: value is not None and is_number(value),
    "skipped": is_count,
    "history": partial(fields.is_list, entry=fields.is_point),
}


def _check(progress: Progress) -> None:
    """Raises Wrong for a field that cannot be used as the rest of the program uses it."""
    for name, good in FIELDS.items():
        expect(good(getattr(progress, name)), name, getattr(progress, name))
    for name, good in IN_EXTRA.items():
        if name in progress.extra:
            expect(good(progress.extra[name]), f"extra.{name}", progress.extra[name])
    for i, result in enumerate(progress.results):
        for name, good in IN_RESULTS.items():
            if name in result:
                expect(good(result[name]), f"results[{i}].{name}", result[name])
        if result.get("versions") and (missing := [name for name in REQUIRED if name not in result]):
            raise Wrong(f"results[{i}] has no {missing[0]}")
        weights = [name for name in result.get("versions", {}) if not name.startswith(("adapters/", "moments/"))]
        if lost := [name for name in weights if name not in progress.versions]:
            raise Wrong(f"versions has no {lost[0]}")  # it would be taken for one that is still to be grown
