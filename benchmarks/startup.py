"""Records how long starts take: cold, from the cache, from exported executables.

    python -m benchmarks.startup --model FOLDER [flags of `jllm bench startup`]

Takes minutes, since a start runs until all programs are there. The kinds take turns.
"""

import argparse

from benchmarks import record
from jllm.bench import startup


def main() -> None:
    """Runs the benchmark, prints its table and appends a row for each kind of start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    startup.add_arguments(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw a PNG (extra plot)")
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    options = parser.parse_args()
    found = startup.run(options)
    rows = [
        {
            "model": found["model"],
            "dtype": found["dtype"],
            "kind": kind,
            **{name: round(value, 3) for name, value in figures.items()},
            "turns": len(found["runs"][kind]),
        }
        for kind, figures in found["results"].items()
    ]
    if not options.dry_run:
        record.append("startup", rows)


if __name__ == "__main__":
    main()
