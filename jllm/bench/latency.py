"""`jllm bench latency`: one batch at a time, every token seen as it comes.

With several input lengths, the time between tokens is fitted to a + b x context: `a` is
the time of the weights, `b` that of the cache.
"""

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from jllm.bench import plot, report
from jllm.bench.limits import MachineLimits
from jllm.bench.session import (
    CompileCounter,
    ModelShape,
    add_model_flags,
    device_limits,
    engine_config,
    read_counters,
    step_figures,
)
from jllm.bench.statistics import RequestTiming, percentile, spread, summarize
from jllm.bench.workload import Workload, WorkloadOptions, make_workload
from jllm.errors import InvalidRequestError
from jllm.types import RequestOutputKind, SamplingParams

PERCENTILES = (10.0, 25.0, 50.0, 75.0, 90.0, 99.0)
DECODE_LINES = (
    report.Line("batch latency, mean ms", "mean_latency_ms"),
    report.Line("batch latency, median ms", "p50_latency_ms"),
    report.Line("batch latency, p99 ms", "p99_latency_ms"),
    report.Line("spread of the batches", "spread", "share"),
    report.Line("tokens/s per row after the first", "decode_tokens_per_second"),
    report.Line("MBU of a step of decode", "decode_mbu", "share"),
    report.Line("MFU of a step of decode", "decode_mfu", "share"),
    report.Line("prompt tokens/s until the first token", "prefill_tokens_per_second"),
    report.Line("MFU of the prefill", "prefill_mfu", "share"),
    report.Line("measured bandwidth, GB/s", "limit_bandwidth_gb_s", ",.1f"),
    report.Line("measured matrix rate, GFLOP/s", "limit_gflop_s", ",.1f"),
    report.Line("programs called per step", "dispatches_per_step"),
    report.Line("copies to the device per step", "uploads_per_step"),
    report.Line("copies to the host per step", "downloads_per_step"),
    report.Line("host, packing and dispatching, us per step", "launch_us_per_step"),
    report.Line("compilations while timed", "compilations", ",d"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--input-len",
        type=int,
        nargs="+",
        default=[32],
        metavar="N",
        help="tokens of each prompt; several lengths are measured in turn",
    )
    group.add_argument("--output-len", type=int, default=128, metavar="N")
    group.add_argument("--batch-size", type=int, default=8, metavar="N")
    group.add_argument("--num-iters-warmup", type=int, default=2, metavar="N")
    group.add_argument("--num-iters", type=int, default=10, metavar="N")
    group.add_argument("--seed", type=int, default=0, metavar="N")
    group.add_argument("--disable-detokenize", action="store_true")
    add_model_flags(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints; returns the result for `--json`."""
    for name in ("output_len", "batch_size", "num_iters"):
        if getattr(options, name) < 1:
            raise InvalidRequestError(
                f"{name}={getattr(options, name)} must be above 0"
            )
    if options.num_iters_warmup < 0:
        raise InvalidRequestError("num_iters_warmup must not be negative")
    with engine_config(options) as config:
        shape = ModelShape.of(config, options.random_weights)
        limits = device_limits(config)
        from jllm.llm import LLM

        with LLM.from_engine_config(config) as llm:
            if config.compile_ahead:
                llm.wait_until_compiled()
            longest = max(options.input_len) + options.output_len
            if longest > llm.max_model_len:
                raise InvalidRequestError(
                    f"input_len + output_len is {longest}, above max_model_len="
                    f"{llm.max_model_len}"
                )
            runs = {
                length: _measure(llm, length, options) for length in options.input_len
            }
    print(f"{shape.name}, {shape.dtype}, on {limits.device}: {options.batch_size} rows")
    results = [_result(*runs[n], n, options, shape, limits) for n in runs]
    for result in results:
        title = f"{result['input_len']}/{options.output_len}"
        report.print_lines(title, result, DECODE_LINES)
        report.print_latencies(result)
    fit = None
    if len(runs) > 1:
        fit = fit_line(gaps_at_context([t for _, ts, _ in runs.values() for t in ts]))
        print(f"\nITL = {1e3 * fit[0]:.3f} ms + {1e6 * fit[1]:.4f} us x context")
    if options.plot:
        _draw(options.plot, [t for _, ts, _ in runs.values() for t in ts])
    return {
        "benchmark": "latency",
        "config": dataclasses.asdict(config),
        "limits": limits.as_dict(),
        "results": results,
        "itl_fit_seconds": fit,
    }


def run_batch(llm: Any, workload: Workload, *, detokenize: bool) -> list[RequestTiming]:
    """Generates a batch as streams read in turns; the times of all tokens."""
    began = time.monotonic()
    streams = [
        llm.stream(
            {"prompt_token_ids": list(request.prompt_token_ids)},
            SamplingParams(
                temperature=0,
                max_tokens=request.max_tokens,
                ignore_eos=True,
                detokenize=detokenize,
                output_kind=RequestOutputKind.DELTA,
            ),
        )
        for request in workload.requests
    ]
    times: list[list[float]] = [[] for _ in streams]
    cached = [0] * len(streams)
    counts = [0] * len(streams)
    open_streams = dict(enumerate(streams))
    with contextlib.ExitStack() as stack:
        for stream in streams:
            stack.enter_context(contextlib.closing(stream))
        while open_streams:
            for index, stream in list(open_streams.items()):
                output = next(stream, None)
                if output is None:
                    del open_streams[index]
                    continue
                times[index].append(time.monotonic())
                cached[index] = output.num_cached_tokens or 0
                counts[index] += len(output.outputs[0].token_ids)
    return [
        RequestTiming(
            num_prompt_tokens=len(request.prompt_token_ids),
            num_output_tokens=counts[i],
            scheduled=began,
            start=began,
            first_token=times[i][0],
            end=times[i][-1],
            chunk_times=tuple(times[i]),
            num_cached_tokens=cached[i],
        )
        for i, request in enumerate(workload.requests)
    ]


def gaps_at_context(timings: Sequence[RequestTiming]) -> list[tuple[float, float]]:
    """Pairs of context length and the time the next token took."""
    return [
        (float(timing.num_prompt_tokens + i + 1), gap)
        for timing in timings
        for i, gap in enumerate(timing.itls)
    ]


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares: intercept and slope."""
    n = len(points)
    mean_x = sum(x for x, _ in points) / n
    mean_y = sum(y for _, y in points) / n
    below = sum((x - mean_x) ** 2 for x, _ in points)
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    slope = above / below if below else 0.0
    return mean_y - slope * mean_x, slope


Run = tuple[list[float], list[RequestTiming], dict[str, float]]


def _measure(llm: Any, input_len: int, options: argparse.Namespace) -> Run:
    """Seconds of each batch, times of its requests, counters of all."""
    workload_options = WorkloadOptions(
        num_prompts=options.batch_size,
        random_input_len=input_len,
        random_output_len=options.output_len,
        seed=options.seed,
    )
    detokenize = not (options.disable_detokenize or llm.config.skip_tokenizer_init)
    seconds: list[float] = []
    timings: list[RequestTiming] = []
    before = read_counters(llm)
    with CompileCounter() as compiled:
        for repetition in range(options.num_iters_warmup + options.num_iters):
            workload = make_workload(
                workload_options, vocab_size=llm.vocab_size, repetition=repetition
            )
            if repetition == options.num_iters_warmup:
                before, compiled.count = read_counters(llm), 0
            batch = run_batch(llm, workload, detokenize=detokenize)
            if repetition >= options.num_iters_warmup:
                seconds.append(max(t.end for t in batch) - batch[0].start)
                timings += batch
    counters = step_figures(before, read_counters(llm))
    return seconds, timings, {**counters, "compilations": compiled.count}


def _result(
    seconds: list[float],
    timings: list[RequestTiming],
    counters: dict[str, float],
    input_len: int,
    options: argparse.Namespace,
    shape: ModelShape,
    limits: MachineLimits,
) -> dict[str, Any]:
    latencies = {
        f"p{percent:g}_latency_ms": 1000 * percentile(seconds, percent)
        for percent in PERCENTILES
    }
    result: dict[str, Any] = {
        "model": shape.name,
        "dtype": shape.dtype,
        "batch_size": options.batch_size,
        "input_len": input_len,
        "output_len": options.output_len,
        "mean_latency_ms": 1000 * sum(seconds) / len(seconds),
        **latencies,
        "latencies": seconds,
        "spread": spread(seconds),
        **counters,
        **summarize(timings, percentiles=PERCENTILES),
        "limit_bandwidth_gb_s": limits.bandwidth / 1e9,
        "limit_gflop_s": limits.matrix_rate(shape.dtype) / 1e9,
    }
    result |= _shares(result, timings, shape, limits, options.batch_size)
    return result


def _shares(
    result: dict[str, Any],
    timings: Sequence[RequestTiming],
    shape: ModelShape,
    limits: MachineLimits,
    num_rows: int,
) -> dict[str, float]:
    """What decode and prefill reach of the limits, by their medians."""
    rate = limits.matrix_rate(shape.dtype)
    first = percentile([t.ttft for t in timings], 50)
    input_len, cost = result["input_len"], shape.cost
    shares = {"prefill_tokens_per_second": num_rows * input_len / first}
    if cost is not None:
        flops = num_rows * cost.prefill_flops(input_len)
        shares["prefill_mfu"] = flops / first / rate
    steps = [t.tpot for t in timings if t.tpot is not None]
    if not steps:
        return shares
    step = percentile(steps, 50)
    shares["decode_tokens_per_second"] = 1 / step
    if cost is not None:
        context = input_len + result["output_len"] / 2
        num_bytes = cost.decode_bytes(num_rows, context)
        shares["decode_mbu"] = num_bytes / step / limits.bandwidth
        shares["decode_mfu"] = cost.decode_flops(num_rows, context) / step / rate
    return shares


def _draw(path: str, timings: Sequence[RequestTiming]) -> None:
    points = [(x, 1000 * y) for x, y in gaps_at_context(timings)]
    by_context: dict[float, list[float]] = {}
    for context, gap in points:
        by_context.setdefault(context, []).append(gap)
    medians = [(x, percentile(by_context[x], 50)) for x in sorted(by_context)]
    plot.draw(
        path,
        [
            plot.Panel("between tokens", "context", "median ms", {"ITL": medians}),
            plot.distribution_panel(
                "between tokens", {"ITL": [gap for t in timings for gap in t.itls]}
            ),
        ],
    )
