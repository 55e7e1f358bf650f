"""Results of a benchmark: printed for a reader, written for a machine, drawn."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jllm.bench.environment import environment
from jllm.bench.statistics import RequestTiming
from jllm.errors import InvalidRequestError

LABEL_WIDTH = 44


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One printed figure.

    Attributes:
        label: What it is.
        key: Where it stands in the result.
        form: How it is formatted; "share" is a percentage.
    """

    label: str
    key: str
    form: str = ",.2f"


LOAD = (
    Line("requests", "completed", ",d"),
    Line("failed requests", "failed", ",d"),
    Line("seconds", "duration"),
    Line("input tokens", "total_input_tokens", ",d"),
    Line("output tokens", "total_output_tokens", ",d"),
    Line("requests/s", "request_throughput"),
    Line("output tokens/s", "output_throughput"),
    Line("input tokens/s", "input_throughput"),
    Line("total tokens/s", "total_token_throughput"),
    Line("goodput, requests/s", "request_goodput"),
    Line("share of good requests", "good_share", "share"),
    Line("prefix hits, of the prompt tokens", "prefix_hit_rate", "share"),
    Line("largest ITL beside a prefill, ms", "max_itl_beside_prefill_ms"),
    Line("p99 ITL beside a prefill, ms", "p99_itl_beside_prefill_ms"),
)
SHARES = (
    Line("measured bandwidth, GB/s", "limit_bandwidth_gb_s", ",.1f"),
    Line("measured matrix rate, GFLOP/s", "limit_gflop_s", ",.1f"),
    Line("MBU: of the bandwidth", "mbu", "share"),
    Line("MFU: of the matrix rate", "mfu", "share"),
    Line("of the serial limit", "share_of_serial_limit", "share"),
)
LATENCIES = {
    "ttft": "time to first token, ms",
    "ttft_from_schedule": "the same from the scheduled arrival, ms",
    "tpot": "time per output token after the first, ms",
    "itl": "between chunks (ITL), ms",
    "itl_per_token": "between tokens, ms",
    "e2el": "end to end, ms",
}


def print_lines(title: str, result: Mapping[str, Any], lines: Sequence[Line]) -> None:
    """Prints the figures of a result that there are."""
    there = [line for line in lines if result.get(line.key) is not None]
    if there:
        print(f"\n{title}")
    for line in there:
        print(
            f"  {line.label:<{LABEL_WIDTH}} {_formatted(result[line.key], line.form)}"
        )


def print_latencies(result: Mapping[str, Any]) -> None:
    """Prints the distributions of a result, one line each."""
    for name, text in LATENCIES.items():
        ending = f"_{name}_ms"
        labels = [
            key.removesuffix(ending)
            for key in result
            if key.endswith(ending) and not key.startswith(("largest", "beside"))
        ]
        if not labels or (name.endswith("_per_token") and not _differs(result)):
            continue
        cells = [f"{label} {result[label + ending]:,.2f}" for label in labels]
        print(f"  {text}\n    {'   '.join(cells)}")


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints rows under a head, right-aligned."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print(
            "  ".join(
                cell.rjust(width) for cell, width in zip(row, widths, strict=True)
            )
        )


def timing_records(timings: Sequence[RequestTiming]) -> list[dict[str, Any]]:
    """The raw times of each request, in seconds from the first start."""
    origin = min((timing.start for timing in timings), default=0.0)
    return [
        {
            **dataclasses.asdict(timing),
            "scheduled": timing.scheduled - origin,
            "start": timing.start - origin,
            "end": timing.end - origin,
            "first_token": (
                None if timing.first_token is None else timing.first_token - origin
            ),
            "chunk_times": [round(t - origin, 6) for t in timing.chunk_times],
        }
        for timing in timings
    ]


def check_output(path: str | None, field: str) -> None:
    """Refuses a file in a folder that is not there, before anything is measured.

    Raises:
        InvalidRequestError: Names the flag and the folder.
    """
    if path is not None and not Path(path).expanduser().parent.is_dir():
        raise InvalidRequestError(f"{field}={path!r}: there is no such folder")


def write_json(path: str, result: Mapping[str, Any]) -> None:
    """Writes one object; a file that ends with .jsonl gets one more line.

    What is needed to repeat the run (commit, machine, versions) is added.
    """
    record = json.dumps(_finite({**result, **environment()}))
    file = Path(path).expanduser()
    if file.suffix == ".jsonl":
        with file.open("a", encoding="utf-8") as out:
            out.write(record + "\n")
    else:
        file.write_text(record + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _formatted(value: Any, form: str) -> str:
    if form == "share":
        return f"{100 * value:,.1f} %"
    return format(value, form)


def _differs(result: Mapping[str, Any]) -> bool:
    """Whether chunks held more than one token, so that the two ITLs differ."""
    return result.get("mean_itl_ms") != result.get("mean_itl_per_token_ms")
