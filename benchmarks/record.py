"""Result files: one JSON object per line, with what is needed to repeat it."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from jllm.bench.environment import environment

RESULTS = pathlib.Path(__file__).parent / "results"


def append(
    name: str, rows: Iterable[Mapping[str, Any]], folder: pathlib.Path = RESULTS
) -> None:
    """Appends rows to `<name>.jsonl` in a folder, each with its environment."""
    where = environment()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a") as file:
        for row in rows:
            file.write(json.dumps({"benchmark": name, **row, **where}) + "\n")


def read(name: str) -> list[dict[str, Any]]:
    """All rows of a result file, oldest first; none if there is no file."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
