"""Writes the tables of README.md and benchmarks/README.md from the result files.

    python -m benchmarks.tables [--check]

A table stands between `<!-- table: name -->` and `<!-- end -->`. With --check nothing
is written, and the exit code is 1 if a table is not what the results say.
"""

import argparse
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import record

ROOT = pathlib.Path(__file__).parents[1]
FILES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def latest(rows: Sequence[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """The newest row of each case."""
    return list({tuple(str(row[key]) for key in keys): row for row in rows}.values())


def kv_waste() -> str:
    """KV slots reserved but unused."""
    rows = latest(record.read("kv_waste"), "workload", "config")
    return markdown(
        ["lengths", "rows", "blocks of 16", "unused, of those in use", "goal"],
        [
            [
                row["workload"],
                row["config"]["max_num_seqs"],
                row["config"]["num_blocks"],
                f"{row['waste_percent']:.2f} %",
                f"< {row['goal_percent']:.0f} %",
            ]
            for row in rows
        ],
    )


def offline() -> str:
    """Offline throughput beside transformers."""
    rows = latest(record.read("offline"), "model", "engine", "requests")
    return markdown(
        ["model", "requests", "engine", "output tokens/s", "jllm, of its rate"],
        [
            [
                row["model"],
                row["requests"],
                row["engine"],
                f"{row['tokens_per_second']:,.0f}",
                "" if row["engine"] == "jllm" else f"{row['jllm_is_faster_by']:.2f} x",
            ]
            for row in rows
        ],
    )


def sampling_draw() -> str:
    """Time of a draw by the two methods."""
    rows = latest(record.read("sampling_draw"), "rows", "vocab_size", "method")
    return markdown(
        ["rows", "vocabulary", "method", "median ms"],
        [
            [row["rows"], row["vocab_size"], row["method"], row["median_ms"]]
            for row in rows
        ],
    )


def aot_steps() -> str:
    """What the compilers of devices that are not here make of the steps."""
    rows = latest(
        record.read("aot_steps"), "device", "num_devices", "head_dim", "program"
    )
    return markdown(
        [
            "device",
            "devices",
            "head width",
            "program",
            "MB of pool",
            "MB of temporaries",
        ],
        [
            [
                row["device"],
                row["num_devices"],
                row["head_dim"],
                row["program"],
                f"{row['pool_bytes'] / 1e6:,.0f}",
                f"{row['temporary_bytes'] / 1e6:,.1f}",
            ]
            for row in rows
        ],
    )


def aot_kernels() -> str:
    """What the compilers of devices that are not here make of the kernels."""
    keys = ("operation", "implementation", "device")
    newest = latest(record.read("aot_kernels"), *keys, "case")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in newest:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return markdown(
        ["operation", "kernel", "device", "compiled", "registers", "spilled bytes"],
        [
            [
                *group,
                f"{sum('custom_calls' in row for row in rows)} of {len(rows)}",
                _largest(rows, "registers"),
                _largest(rows, "spilled_bytes"),
            ]
            for group, rows in sorted(groups.items())
        ],
    )


def _largest(rows: Sequence[dict[str, Any]], field: str) -> object:
    """The largest figure of any kernel of some rows, empty where none is known."""
    kernels = [kernel for row in rows for kernel in row.get("kernels", [])]
    return max((kernel[field] for kernel in kernels), default="")


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (aot_kernels, aot_steps, kv_waste, offline, sampling_draw)
}


def render(text: str) -> str:
    """The text with every table made anew."""
    return TABLE.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


def main() -> int:
    """Writes or checks the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = [path for path in FILES if render(path.read_text()) != path.read_text()]
    for path in stale:
        if check:
            print(f"{path.name}: a table is not what the results say")
        else:
            path.write_text(render(path.read_text()))
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
