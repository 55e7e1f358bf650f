"""`jllm bench sweep`: a server at several loads; which of them no other one beats."""

import argparse
import asyncio
import contextlib
import dataclasses
import math
import shlex
import signal
import subprocess
import zlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from jllm.bench import plot, report
from jllm.bench.arrivals import Arrivals
from jllm.bench.serve import Setup, add_server_flags, check, prepare, run_once
from jllm.bench.workload import WorkloadOptions
from jllm.errors import EngineStoppedError, InvalidRequestError
from jllm.flags import given_values

COLUMNS = {
    "most at once": ("max_concurrency", "g"),
    "requests/s asked": ("request_rate", "g"),
    "requests/s": ("request_throughput", ",.2f"),
    "output tokens/s": ("output_throughput", ",.1f"),
    "tokens/s per user": ("interactivity", ",.1f"),
    "TTFT p50 ms": ("p50_ttft_ms", ",.0f"),
    "TTFT p99 ms": ("p99_ttft_ms", ",.0f"),
    "TPOT p50 ms": ("p50_tpot_ms", ",.1f"),
    "TPOT p99 ms": ("p99_tpot_ms", ",.1f"),
    "good": ("good_share", ".0%"),
    "failed": ("failed", "d"),
}
STOP_SECONDS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    add_server_flags(parser)
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--max-concurrency",
        type=int,
        nargs="+",
        metavar="N",
        help="caps to run with; 1 2 4 8 16 32 where no rates are given",
    )
    group.add_argument(
        "--request-rate", type=float, nargs="+", metavar="R", help="rates to run with"
    )
    group.add_argument("--burstiness", type=float, default=1.0, metavar="B")
    group.add_argument(
        "--prompts-per-concurrency",
        type=int,
        metavar="N",
        help="requests of a run, times its cap; none takes --num-prompts",
    )
    group.add_argument(
        "--search-goodput",
        type=float,
        metavar="SHARE",
        help="bisect to the highest rate with that share of good requests",
    )
    group.add_argument("--search-steps", type=int, default=5, metavar="N")
    group.add_argument(
        "--serve-cmd", metavar="COMMAND", help="start this server, stop it afterwards"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """One cell of the grid.

    Attributes:
        max_concurrency: Most requests at once; None is no cap.
        request_rate: Requests per second, may be infinite.
    """

    max_concurrency: int | None
    request_rate: float


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints; returns the result for `--json`."""
    check(options)
    loads = make_loads(options)
    workload_options = WorkloadOptions(**given_values(options, WorkloadOptions))
    with _server(options.serve_cmd):
        setup = asyncio.run(prepare(options))
        results = [_run(load, options, setup, workload_options) for load in loads]
        if options.search_goodput is not None:
            results += _search(options, setup, workload_options, results)
    for result, is_best in zip(results, pareto(results), strict=True):
        result["pareto"] = is_best
    _print(results)
    if options.plot:
        _draw(options.plot, results)
    return {
        "benchmark": "sweep",
        "workload_options": dataclasses.asdict(workload_options),
        "limits": setup.limits.as_dict() if setup.limits else None,
        "results": results,
        "failed": sum(result["failed"] for result in results),
    }


def make_loads(options: argparse.Namespace) -> list[Load]:
    """The grid: every cap with every rate.

    Raises:
        InvalidRequestError: A value is out of range, or a search lacks what it needs.
    """
    caps, rates = options.max_concurrency, options.request_rate
    if caps is None:
        caps = [None] if rates else [1, 2, 4, 8, 16, 32]
    for cap in caps:
        if cap is not None and cap < 1:
            raise InvalidRequestError(f"max_concurrency={cap} must be above 0")
    for name in ("search_steps", "prompts_per_concurrency"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InvalidRequestError(f"{name}={value} must be above 0")
    share = options.search_goodput
    if share is not None:
        if not 0 < share <= 1:
            raise InvalidRequestError(f"search_goodput={share} must be in (0, 1]")
        if not options.goodput or not rates:
            raise InvalidRequestError("search_goodput needs goodput and request_rate")
    loads = [Load(cap, rate) for cap in caps for rate in rates or [math.inf]]
    for load in loads:
        Arrivals(request_rate=load.request_rate, burstiness=options.burstiness)
    return loads


def pareto(results: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which results no other beats in both throughput and speed per user."""
    points = [
        (result.get("output_throughput", 0.0), result.get("interactivity", 0.0))
        for result in results
    ]
    return [
        not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)
        for x, y in points
    ]


def _run(
    load: Load,
    options: argparse.Namespace,
    setup: Setup,
    workload_options: WorkloadOptions,
) -> dict[str, Any]:
    """One load, with tokens that no other one has."""
    if options.prompts_per_concurrency and load.max_concurrency:
        count = options.prompts_per_concurrency * load.max_concurrency
        workload_options = dataclasses.replace(workload_options, num_prompts=count)
    own_seed = zlib.crc32(f"{workload_options.seed} {load}".encode())
    workload_options = dataclasses.replace(workload_options, seed=own_seed)
    arrivals = Arrivals(request_rate=load.request_rate, burstiness=options.burstiness)
    result, _ = run_once(
        options, setup, workload_options, arrivals, load.max_concurrency
    )
    tpot = result.get("median_tpot_ms")
    return {**result, "interactivity": 1000 / tpot if tpot else 0.0}


def _search(
    options: argparse.Namespace,
    setup: Setup,
    workload_options: WorkloadOptions,
    results: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Halves the distance between the highest good rate and the lowest bad one."""
    wanted = options.search_goodput
    good = [r["request_rate"] for r in results if r.get("good_share", 0) >= wanted]
    bad = [r["request_rate"] for r in results if r.get("good_share", 0) < wanted]
    low = max(good, default=0.0)
    high = min((rate for rate in bad if rate > low), default=math.inf)
    found: list[dict[str, Any]] = []
    for _ in range(options.search_steps):
        rate = 2 * low if math.isinf(high) else (low + high) / 2
        cap = results[0]["max_concurrency"]
        result = _run(Load(cap, rate), options, setup, workload_options)
        found.append(result)
        if result.get("good_share", 0) >= wanted:
            low = rate
        else:
            high = rate
    print(f"highest rate with {wanted:.0%} good requests: {low:.3g} requests/s")
    return found


@contextlib.contextmanager
def _server(command: str | None) -> Generator[None]:
    """Runs a server meanwhile; whoever waits for it notices when it ends."""
    if command is None:
        yield
        return
    try:
        process = subprocess.Popen(shlex.split(command))
    except (OSError, ValueError) as error:
        raise EngineStoppedError(
            f"serve_cmd={command!r} cannot be run: {error}"
        ) from error
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _print(results: Sequence[Mapping[str, Any]]) -> None:
    columns = {
        title: (key, form)
        for title, (key, form) in COLUMNS.items()
        if any(result.get(key) is not None for result in results)
    }
    rows = [
        [
            *(_cell(result.get(key), form) for key, form in columns.values()),
            "*" if result["pareto"] else "",
        ]
        for result in results
    ]
    report.print_table([*columns, "Pareto"], rows)


def _cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _draw(path: str, results: Sequence[Mapping[str, Any]]) -> None:
    points = sorted(
        (result["interactivity"], result.get("output_throughput", 0.0))
        for result in results
    )
    plot.draw(
        path,
        [
            plot.Panel(
                "throughput against speed",
                "output tokens/s per user",
                "output tokens/s",
                {"loads": points},
                style="points",
            )
        ],
    )
