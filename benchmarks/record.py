"""Result files: one JSON object per line, with what is needed to repeat it."""

import datetime as dt
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


def git(*arguments: str) -> str:
    """Output of a git command in the checkout, empty where there is none."""
    command = ["git", "-C", str(RESULTS.parent), *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def processor() -> str:
    """Name of the processor."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def environment() -> dict[str, Any]:
    """Date, commit (marked when the tree differs from it), machine and versions."""
    changed = git("status", "--porcelain", "--", ":!benchmarks/results")
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") + ("+changes" if changed else ""),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
    }


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
