"""How long a killed server is away: from the start of the next one to its readiness.

    python -m benchmarks.server.restart --record

It is started with an empty cache of compiled programs, killed, started again, killed,
and started once more with every file of the cache damaged, which is to cost time only.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.server.client import send_all
from benchmarks.server.load import bodies
from benchmarks.server.process import serving

GOAL_SECONDS = 15.0


def start(folder: Path) -> float:
    """Starts a server, asks it something and kills it; seconds until it was ready."""
    began = time.monotonic()
    with serving("--compilation-cache-dir", str(folder)) as server:
        seconds = time.monotonic() - began
        answers, _ = send_all(server.port, bodies(2, 4))
        if any(answer.tokens != 4 for answer in answers):
            raise ValueError("an answer is not whole")
        wait_for_files(folder)
        server.process.kill()
        server.process.wait()
    return seconds


def wait_for_files(folder: Path) -> None:
    """Returns when no file has been written for some seconds."""
    count, since = -1, time.monotonic()
    while time.monotonic() - since < 5:
        now = len(files(folder))
        if now != count:
            count, since = now, time.monotonic()
        time.sleep(0.2)


def files(folder: Path) -> list[Path]:
    """All files below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def damage(folder: Path) -> int:
    """Overwrites the middle of every file; how many there were."""
    found = files(folder)
    for path in found:
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(size // 2)
            file.write(os.urandom(min(64, size - size // 2)))
    return len(found)


def measure() -> dict[str, Any]:
    """Starts three times."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = start(folder)
        again = start(folder)
        count = damage(folder)
        damaged = start(folder)
    return {
        "case": "embedded model, from the start to /ready",
        "first_s": round(first, 1),
        "after_kill_s": round(again, 1),
        "with_damaged_cache_s": round(damaged, 1),
        "files_damaged": count,
        "passed": again <= GOAL_SECONDS and count > 0,
    }


def main() -> None:
    """Measures; exits with 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="append to results/")
    arguments = parser.parse_args()
    row = measure()
    print(json.dumps(row, indent=1))
    if arguments.record:
        record.append("server_restart", [row])
    sys.exit(not row["passed"])


if __name__ == "__main__":
    main()
