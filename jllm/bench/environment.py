"""What must be known to repeat a measurement: commit, machine, versions."""

import datetime as dt
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "numpy")


def git(folder: Path, *arguments: str) -> str:
    """Output of a git command in a folder, empty where there is no checkout."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def processor() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def environment() -> dict[str, Any]:
    """Date, commit (marked when the tree differs from it), machine and versions.

    The commit is that of the checkout the package runs from; empty outside of one,
    where the package's version has to do.
    """
    root = Path(__file__).parents[2]
    # An installed package may lie in the checkout of another project.
    commit = git(root, "rev-parse", "HEAD") if (root / ".git").exists() else ""
    if commit and git(root, "status", "--porcelain", "--", ":!benchmarks/results"):
        commit += "+changes"
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "jllm": metadata.version("jllm"),
        **{name: metadata.version(name) for name in PACKAGES},
    }
