"""The progress record: how far a run has come, and which saved items that state consists of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from stackwise_jax.checkpoint.files import read_json, write_json
from stackwise_jax.errors import RunError

FORMAT = 1  # raised whenever an older program could misread a record


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
    digests: dict[str, str] = field(default_factory=dict)  # file of the run that never changes -> its sha256
    metrics_bytes: int = 0  # length of metrics.jsonl at this moment
    results: list[dict] = field(default_factory=list)  # of the phases that have ended; "versions": as they were then
    bad_steps: int = 0  # non-finite steps in a row
    finished: bool = False
    extra: dict = field(default_factory=dict)

    @property
    def needed(self) -> set[tuple[str, int]]:
        """The (item name, version) pairs that must stay: this state's, and for each path those that the last phase
        which took it names in `versions`, so that the rack can still be loaded as it was then."""
        path = lambda result: tuple(result.get("path", [result.get("depth")]))  # older records name the depth only
        by_path = {path(result): result["versions"] for result in self.results if "versions" in result}
        return {pair for table in (self.versions, *by_path.values()) for pair in table.items()}


def write_progress(path: Path, progress: Progress) -> None:
    """Write a record atomically. Raises what the file system raises."""
    write_json(path, {"format": FORMAT, "progress": dataclasses.asdict(progress)})


def read_progress(path: Path) -> Progress:
    """Read a record.

    Raises:
        RunError: the file is missing or damaged, or a newer version of the program wrote it.
    """
    data = read_json(path)
    if data.get("format") != FORMAT:
        raise RunError(f"{path} has format {data.get('format')}; this program reads format {FORMAT}: use the newer one")
    try:
        return Progress(**data["progress"])
    except (KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
