"""The stored counts, and what a difference to them means."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

FOLDER = pathlib.Path(__file__).parent
TOLERANCE = {"temporary_bytes": 0.02, "bytes_accessed": 0.01, "flops": 0.01}
"""Shares by which a count may move before it is said to have changed."""

Counts = Mapping[str, Mapping[str, int]]
"""Counts by name, by program or workload."""


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """A count that differs from the stored one; every count is better when smaller.

    Attributes:
        program: What was counted.
        name: The count.
        old: As stored; None if it is new.
        new: As found; None if it is gone.
    """

    program: str
    name: str
    old: int | None
    new: int | None

    @property
    def is_worse(self) -> bool:
        """Whether it grew, appeared or vanished: the table must say so."""
        return self.old is None or self.new is None or self.new > self.old

    def __str__(self) -> str:
        """One line: program, count, old and new."""
        word = "worse" if self.is_worse else "better"
        return f"{word}: {self.program}: {self.name}: {self.old} -> {self.new}"


def compare(stored: Counts, found: Counts) -> list[Change]:
    """Every count that differs by more than its tolerance, in order of the programs."""
    changes: list[Change] = []
    for program in sorted({*stored, *found}):
        old, new = stored.get(program, {}), found.get(program, {})
        for name in sorted({*old, *new}):
            a, b = old.get(name), new.get(name)
            slack = TOLERANCE.get(name, 0.0) * (a or 0)
            if a is None or b is None or abs(b - a) > slack:
                changes.append(Change(program, name, a, b))
    return changes


def read(kind: str, folder: pathlib.Path = FOLDER) -> dict[str, dict[str, int]]:
    """The table of a kind; empty if there is none."""
    path = folder / f"{kind}.json"
    return json.loads(path.read_text())["counts"] if path.exists() else {}


def versions(kind: str, folder: pathlib.Path = FOLDER) -> dict[str, str]:
    """With what a table was made; empty if there is none."""
    path = folder / f"{kind}.json"
    return json.loads(path.read_text())["versions"] if path.exists() else {}


def write(
    kind: str,
    counts: Counts,
    made_with: Mapping[str, str | None],
    folder: pathlib.Path = FOLDER,
) -> None:
    """Replaces a table; sorted, so that a change of it can be read in a diff."""
    content = {"versions": dict(made_with), "counts": counts}
    text = json.dumps(content, indent=1, sort_keys=True)
    (folder / f"{kind}.json").write_text(text + "\n")
