"""`jllm bench serve`: drives an OpenAI-compatible server and times its streams."""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from jllm.bench import plot, report
from jllm.bench.arrivals import Arrivals, arrival_times, trace_times
from jllm.bench.client import ENDPOINTS, Target, run_load
from jllm.bench.limits import MachineLimits, RunCost
from jllm.bench.session import ModelShape
from jllm.bench.statistics import (
    RequestTiming,
    parse_goodput,
    percentile,
    summarize,
)
from jllm.bench.workload import Workload, WorkloadOptions, make_workload
from jllm.config import EngineConfig
from jllm.errors import EngineStoppedError, InvalidRequestError
from jllm.flags import add_flags, given_values

LOOPBACK = ("localhost", "127.0.0.1", "::1")
GAUGES = ("num_requests_running", "num_requests_waiting")
POLL_SECONDS = 0.5
SERVER_LINES = (
    report.Line("running on the server, mean", "mean_num_requests_running"),
    report.Line("running on the server, most", "max_num_requests_running", ",.0f"),
    report.Line("waiting on the server, mean", "mean_num_requests_waiting"),
    report.Line("waiting on the server, most", "max_num_requests_waiting", ",.0f"),
)
LIMITS_PROGRAM = """
import json
from jllm.bench.limits import measure_limits
limits = measure_limits()
print(json.dumps([limits.device, limits.bandwidth, dict(limits.matrix_rates)]))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    add_server_flags(parser)
    add_flags(parser.add_argument_group("arrivals"), Arrivals)
    group = parser.add_argument_group("load")
    group.add_argument(
        "--max-concurrency", type=int, metavar="N", help="most requests at once"
    )


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `serve` and `sweep` share."""
    group = parser.add_argument_group("server")
    group.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL")
    group.add_argument("--backend", choices=tuple(ENDPOINTS), default="openai")
    group.add_argument("--endpoint", metavar="PATH", help="none is the backend's own")
    group.add_argument(
        "--model",
        help="directory of the served model, for its vocabulary and the limits; "
        "none is what the server names, if it is a directory here",
    )
    group.add_argument(
        "--served-model-name", metavar="NAME", help="none asks the server"
    )
    group.add_argument(
        "--vocab-size", type=int, metavar="N", help="where the model is not here"
    )
    group.add_argument("--api-key", metavar="KEY")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T")
    group.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True
    )
    group.add_argument("--ready-check-timeout-sec", type=float, default=60, metavar="S")
    add_flags(parser.add_argument_group("workload"), WorkloadOptions)
    group = parser.add_argument_group("measurement")
    group.add_argument("--num-warmups", type=int, default=2, metavar="N")
    group.add_argument(
        "--self-timed", action="store_true", help="arrivals as in the trace"
    )
    group.add_argument("--goodput", nargs="+", default=[], metavar="METRIC:MS")
    group.add_argument(
        "--metric-percentiles", type=_percentiles, default=[50, 90, 99], metavar="LIST"
    )
    group.add_argument(
        "--limits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure this machine's limits first, if the server is on it",
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """What is found out before the first request.

    Attributes:
        target: Where requests go.
        vocab_size: Token ids that prompts may hold.
        max_model_len: Longest context of the server; None if it does not tell.
        shape: The model's, None where it is not known here.
        limits: The machine's, None where the server is elsewhere.
    """

    target: Target
    vocab_size: int
    max_model_len: int | None
    shape: ModelShape | None
    limits: MachineLimits | None


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints; returns the result for `--json`."""
    arrivals = Arrivals(**given_values(options, Arrivals))
    workload_options = WorkloadOptions(**given_values(options, WorkloadOptions))
    check(options)
    if options.max_concurrency is not None and options.max_concurrency < 1:
        raise InvalidRequestError(
            f"max_concurrency={options.max_concurrency} is below 1"
        )
    setup = asyncio.run(prepare(options))
    result, timings = run_once(
        options, setup, workload_options, arrivals, options.max_concurrency
    )
    print_result(result)
    if options.plot:
        done = [t for t in timings if t.is_complete]
        samples = {
            "TTFT": [t.ttft for t in done],
            "ITL": [itl for t in done for itl in t.itls],
        }
        panels = [plot.distribution_panel(k, {k: v}) for k, v in samples.items() if v]
        plot.draw(options.plot, [*panels, _rate_panel(done)])
    return {
        "benchmark": "serve",
        "workload_options": dataclasses.asdict(workload_options),
        "limits": setup.limits.as_dict() if setup.limits else None,
        **result,
        "timings": report.timing_records(timings),
    }


def check(options: argparse.Namespace) -> None:
    """Refuses wrong flags before a server is asked."""
    parse_goodput(options.goodput)
    if options.num_warmups < 0:
        raise InvalidRequestError("num_warmups must not be negative")
    if options.vocab_size is not None and options.vocab_size < 8:
        raise InvalidRequestError(f"vocab_size={options.vocab_size} is below 8")
    if urlsplit(options.base_url).scheme not in ("http", "https"):
        raise InvalidRequestError(f"base_url={options.base_url!r} is no http address")


async def prepare(options: argparse.Namespace) -> Setup:
    """Waits until the server answers, and finds out what it serves.

    Raises:
        EngineStoppedError: It did not answer in time.
        InvalidRequestError: The vocabulary is not known.
    """
    base = options.base_url.rstrip("/")
    served = await _wait_for_models(
        f"{base}/v1/models", options.api_key, options.ready_check_timeout_sec
    )
    shape = _shape(options.model, served)
    vocab_size = options.vocab_size or (shape.vocab_size if shape else None)
    if vocab_size is None and options.backend == "openai":
        raise InvalidRequestError(
            "the served model is no directory here: give --model or --vocab-size"
        )
    is_here = urlsplit(base).hostname in LOOPBACK
    wants = options.limits and is_here and shape is not None
    return Setup(
        target=Target(
            url=base + (options.endpoint or ENDPOINTS[options.backend]),
            backend=options.backend,
            model=options.served_model_name or served.get("id", ""),
            temperature=options.temperature,
            ignore_eos=options.ignore_eos,
            api_key=options.api_key,
        ),
        vocab_size=vocab_size or 32000,
        max_model_len=served.get("max_model_len"),
        shape=shape,
        limits=_limits_of_this_machine() if wants else None,
    )


def run_once(
    options: argparse.Namespace,
    setup: Setup,
    workload_options: WorkloadOptions,
    arrivals: Arrivals,
    max_concurrency: int | None,
) -> tuple[dict[str, Any], list[RequestTiming]]:
    """One run at one load; the figures and the times of its requests."""
    workload = make_workload(
        workload_options,
        vocab_size=setup.vocab_size,
        max_model_len=setup.max_model_len,
    )
    if options.self_timed:
        recorded = [r.arrival for r in workload.requests if r.arrival is not None]
        if len(recorded) != len(workload.requests):
            raise InvalidRequestError("self_timed needs a trace with times")
        times = trace_times(recorded)
    else:
        times = arrival_times(arrivals, len(workload.requests), workload_options.seed)
    warmup = dataclasses.replace(
        workload_options, num_prompts=max(1, options.num_warmups)
    )
    timings, gauges = asyncio.run(
        _load(options, setup, (warmup, workload, times), max_concurrency)
    )
    percentiles = options.metric_percentiles
    result: dict[str, Any] = {
        "backend": setup.target.backend,
        "model": setup.shape.name if setup.shape else setup.target.model,
        "workload": workload.name,
        "workload_hash": workload.digest,
        "num_cut": workload.num_cut,
        "request_rate": arrivals.request_rate,
        "burstiness": arrivals.burstiness,
        "max_concurrency": max_concurrency,
        **summarize(
            timings, percentiles=percentiles, goodput=parse_goodput(options.goodput)
        ),
        **gauges,
    }
    return result | _shares(result, timings, setup), timings


def print_result(result: Mapping[str, Any]) -> None:
    """Prints the figures of one run."""
    cap = result["max_concurrency"]
    at_most = f", at most {cap} at once" if cap else ""
    print(
        f"{result['model']}, {result['workload']}, "
        f"{result['request_rate']:g} requests/s{at_most}"
    )
    report.print_lines("load", result, report.LOAD)
    report.print_latencies(result)
    report.print_lines("server", result, SERVER_LINES)
    report.print_lines("limits", result, report.SHARES)
    for reason, count in result["errors"].items():
        print(f"  {count} x {reason}")


async def _load(
    options: argparse.Namespace,
    setup: Setup,
    plan: tuple[WorkloadOptions, Workload, Sequence[float]],
    max_concurrency: int | None,
) -> tuple[list[RequestTiming], dict[str, float]]:
    """Warms up, then sends the load while the server's gauges are read."""
    warmup_options, workload, times = plan
    if options.num_warmups:
        warmup = make_workload(
            warmup_options,
            vocab_size=setup.vocab_size,
            max_model_len=setup.max_model_len,
            repetition=1,
        )
        await run_load(
            setup.target, warmup.requests, [0.0] * len(warmup.requests), None
        )
    gauges: dict[str, list[float]] = {name: [] for name in GAUGES}
    poll = asyncio.create_task(_poll(options.base_url.rstrip("/"), gauges))
    try:
        timings = await run_load(
            setup.target, workload.requests, times, max_concurrency
        )
    finally:
        poll.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await poll
    figures: dict[str, float] = {}
    for name, values in gauges.items():
        if values:
            figures[f"mean_{name}"] = sum(values) / len(values)
            figures[f"max_{name}"] = max(values)
    return timings, figures


async def _poll(base: str, gauges: dict[str, list[float]]) -> None:
    """Reads the server's metrics now and then, if it has any."""
    import aiohttp
    from prometheus_client.parser import text_string_to_metric_families

    async with aiohttp.ClientSession() as session:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                async with session.get(f"{base}/metrics") as response:
                    if response.status != 200:
                        return
                    text = await response.text()
                for family in text_string_to_metric_families(text):
                    for name in GAUGES:
                        if family.name.endswith(name):
                            total = sum(s.value for s in family.samples)
                            gauges[name].append(total)
            except (aiohttp.ClientError, ValueError):
                return


async def _wait_for_models(
    url: str, api_key: str | None, seconds: float
) -> dict[str, Any]:
    """What the server says of its first model; it may be starting still."""
    import aiohttp

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    deadline = time.monotonic() + seconds
    async with aiohttp.ClientSession(headers=headers) as session:
        while True:
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        models = (await response.json()).get("data") or [{}]
                        return models[0]
                    problem = f"HTTP {response.status}"
            except (aiohttp.ClientError, ValueError) as error:
                problem = str(error)
            if time.monotonic() > deadline:
                raise EngineStoppedError(f"{url} did not answer: {problem}")
            await asyncio.sleep(0.2)


def _shape(model: str | None, served: Mapping[str, Any]) -> ModelShape | None:
    """Of the model named, or of the directory that the server names."""
    if model is not None:
        return ModelShape.of(EngineConfig(model=model))
    for name in (served.get("root"), served.get("id")):
        if isinstance(name, str) and name.startswith("/"):
            with contextlib.suppress(Exception):
                return ModelShape.of(EngineConfig(model=name))
    return None


def _limits_of_this_machine() -> MachineLimits | None:
    """Measured in a process that then gives the device back; None where it cannot."""
    command = ["env", "XLA_PYTHON_CLIENT_PREALLOCATE=false", sys.executable, "-c"]
    done = subprocess.run(
        [*command, LIMITS_PROGRAM], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = " ".join(done.stderr.strip().splitlines()[-1:])
        print(f"limits not measured: {reason}", file=sys.stderr)
        return None
    return MachineLimits(*json.loads(done.stdout.splitlines()[-1]))


def _shares(
    result: Mapping[str, Any], timings: Sequence[RequestTiming], setup: Setup
) -> dict[str, float]:
    """Shares of the limits; a step is taken to last the median ITL."""
    shape, limits = setup.shape, setup.limits
    done = [t for t in timings if t.is_complete]
    if shape is None or shape.cost is None or limits is None or not done:
        return {}
    seconds = result["duration"]
    cost = RunCost.of(shape.cost, done)
    num_rows = max(1, round(sum(t.e2el for t in done) / seconds))
    shares = {
        "share_of_serial_limit": cost.serial_seconds(limits, shape.dtype, num_rows)
        / seconds,
        "limit_bandwidth_gb_s": limits.bandwidth / 1e9,
        "limit_gflop_s": limits.matrix_rate(shape.dtype) / 1e9,
    }
    flops = cost.linear_flops + cost.attention_flops
    shares["mfu"] = flops / seconds / limits.matrix_rate(shape.dtype)
    itl = percentile([itl for t in done for itl in t.itls], 50)
    if math.isfinite(itl) and itl > 0:
        tokens = result["total_input_tokens"] + result["total_output_tokens"] / 2
        num_bytes = shape.cost.decode_bytes(num_rows, tokens / len(done))
        shares["mbu"] = num_bytes / itl / limits.bandwidth
    return shares


def _rate_panel(done: Sequence[RequestTiming]) -> plot.Panel:
    """Chunks per second over the run."""
    origin = min((t.start for t in done), default=0.0)
    counts: dict[int, int] = {}
    for timing in done:
        for chunk in timing.chunk_times:
            second = int(chunk - origin)
            counts[second] = counts.get(second, 0) + 1
    points = [(second, float(counts[second])) for second in sorted(counts)]
    return plot.Panel("over time", "s", "chunks/s", {"chunks": points})


def _percentiles(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError("percentiles lie between 0 and 100")
    return values
