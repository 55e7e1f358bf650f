"""`jllm bench throughput`: all requests at once, through `LLM.generate`."""

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

from jllm.bench import plot, report
from jllm.bench.limits import MachineLimits, RunCost
from jllm.bench.session import (
    CompileCounter,
    ModelShape,
    Sampler,
    add_model_flags,
    device_limits,
    engine_config,
    engines_of,
    read_counters,
    step_figures,
)
from jllm.bench.statistics import RequestTiming, percentile, spread, summarize
from jllm.bench.workload import Workload, WorkloadOptions, make_workload
from jllm.config import EngineConfig
from jllm.errors import InvalidRequestError
from jllm.flags import add_flags, given_values
from jllm.types import SamplingParams

ENGINE_LINES = (
    report.Line("steps", "steps", ",d"),
    report.Line("rows per step", "rows_per_step"),
    report.Line("mixed steps (prompts and single tokens)", "mixed_share", "share"),
    report.Line("padding, of the tokens computed", "padding_share", "share"),
    report.Line("programs called per step", "dispatches_per_step"),
    report.Line("copies to the device per step", "uploads_per_step"),
    report.Line("copies to the host per step", "downloads_per_step"),
    report.Line("host, packing and dispatching, us per step", "launch_us_per_step"),
    report.Line("running, mean", "mean_running"),
    report.Line("waiting, mean", "mean_waiting"),
    report.Line("preemptions", "preemptions", ",d"),
    report.Line("tokens computed again", "recomputed_share", "share"),
    report.Line("KV pool in use, peak", "pool_peak", "share"),
    report.Line("KV slots reserved but unused, mean", "kv_waste", "share"),
    report.Line("compilations while timed", "compilations", ",d"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    add_flags(parser.add_argument_group("workload"), WorkloadOptions)
    add_model_flags(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--num-iters-warmup", type=int, default=1, metavar="N")
    group.add_argument("--num-iters", type=int, default=3, metavar="N")
    group.add_argument("--disable-detokenize", action="store_true")
    group.add_argument(
        "--compare",
        type=json.loads,
        metavar="JSON",
        help="engine options of a second engine, which takes turns with the first, "
        'such as {"enable_prefix_caching": false}',
    )


@dataclasses.dataclass(slots=True)
class Variant:
    """An engine that takes part.

    Attributes:
        name: In the output.
        llm: The engine.
        results: One per timed pass.
        timings: Of the requests of all timed passes.
    """

    name: str
    llm: Any
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    timings: list[RequestTiming] = dataclasses.field(default_factory=list)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints; returns the result for `--json`."""
    workload_options = WorkloadOptions(**given_values(options, WorkloadOptions))
    for name in ("num_iters", "num_iters_warmup"):
        if getattr(options, name) < (name == "num_iters"):
            raise InvalidRequestError(f"{name}={getattr(options, name)} is too small")
    with engine_config(options) as config:
        configs = {"jllm": config}
        if options.compare is not None:
            if not isinstance(options.compare, dict):
                raise InvalidRequestError("compare must be a JSON object")
            configs[json.dumps(options.compare)] = _changed(config, options.compare)
        shape = ModelShape.of(config, options.random_weights)
        limits = device_limits(config)
        with contextlib.ExitStack() as stack:
            variants = [
                Variant(name, stack.enter_context(_open(each)))
                for name, each in configs.items()
            ]
            workload = _measure(variants, workload_options, options)
            max_rows = _max_rows(variants[0].llm, workload)
    print(
        f"{shape.name}, {shape.dtype}, on {limits.device}: {len(workload.requests)} "
        f"requests, {workload.name}; {options.num_iters} passes, medians"
    )
    results = [
        _result(variant, workload, shape, limits, max_rows) for variant in variants
    ]
    for result in results:
        _print(result)
    if len(results) > 1:
        ratio = results[0]["output_throughput"] / results[1]["output_throughput"]
        print(f"\n{results[0]['variant']} is {ratio:.3f} x {results[1]['variant']}")
    if options.plot:
        _draw(options.plot, variants)
    return {
        "benchmark": "throughput",
        "config": dataclasses.asdict(config),
        "workload_options": dataclasses.asdict(workload_options),
        "limits": limits.as_dict(),
        **results[0],
        "compared": results[1:],
        "timings": report.timing_records(variants[0].timings),
    }


def run_pass(
    llm: Any, workload: Workload, *, detokenize: bool = True
) -> tuple[dict[str, Any], list[RequestTiming]]:
    """Generates once; the figures of the pass and the times of its requests."""
    prompts = [
        {"prompt_token_ids": list(r.prompt_token_ids)} for r in workload.requests
    ]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=r.max_tokens,
            ignore_eos=True,
            detokenize=detokenize,
        )
        for r in workload.requests
    ]
    before = read_counters(llm)
    with Sampler(llm) as sampler, CompileCounter() as compiled:
        began = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        ended = time.monotonic()
    timings = [_timing(output, began) for output in outputs]
    figures = summarize(timings)
    engine = step_figures(before, read_counters(llm))
    # What there was to compute; the last token of an output is not fed back.
    needed = sum(
        t.num_prompt_tokens - (t.num_cached_tokens or 0) + t.num_output_tokens - 1
        for t in timings
    )
    computed = engine.pop("computed_tokens")
    engine["recomputed_share"] = max(0.0, computed / max(needed, 1) - 1)
    figures |= engine | sampler.figures()
    figures |= {"compilations": compiled.count, "wall": ended - began}
    return figures, timings


def _open(config: EngineConfig) -> Any:
    from jllm.llm import LLM

    llm = LLM.from_engine_config(config)
    if config.compile_ahead:
        llm.wait_until_compiled()
    return llm


def _changed(config: EngineConfig, changes: dict[str, Any]) -> EngineConfig:
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    for name in changes:
        if name not in known:
            raise InvalidRequestError(f"compare: {name} is no engine option")
    return dataclasses.replace(config, **changes)


def _measure(
    variants: Sequence[Variant],
    workload_options: WorkloadOptions,
    options: argparse.Namespace,
) -> Workload:
    """Passes of all variants in turns; returns the last workload."""
    llm = variants[0].llm
    detokenize = not (options.disable_detokenize or llm.config.skip_tokenizer_init)
    workload = None
    for repetition in range(options.num_iters_warmup + options.num_iters):
        workload = make_workload(
            workload_options,
            vocab_size=llm.vocab_size,
            max_model_len=llm.max_model_len,
            repetition=repetition,
        )
        for variant in variants:
            figures, timings = run_pass(variant.llm, workload, detokenize=detokenize)
            if repetition >= options.num_iters_warmup:
                variant.results.append(figures)
                variant.timings += timings
    assert workload is not None
    return workload


def _timing(output: Any, began: float) -> RequestTiming:
    metrics, completion = output.metrics, output.outputs[0]
    failed = completion.finish_reason == "error"
    return RequestTiming(
        num_prompt_tokens=len(output.prompt_token_ids),
        num_output_tokens=len(completion.token_ids),
        scheduled=began,
        start=began,
        first_token=metrics.first_token_time,
        end=metrics.finished_time,
        num_cached_tokens=output.num_cached_tokens,
        error="the engine reported an error" if failed else None,
    )


def _result(
    variant: Variant,
    workload: Workload,
    shape: ModelShape,
    limits: MachineLimits,
    max_rows: int,
) -> dict[str, Any]:
    """Medians over the passes, with the shares of the limits."""
    passes = variant.results
    numbers = {
        name: percentile([float(p[name]) for p in passes if name in p], 50)
        for name, value in passes[0].items()
        if isinstance(value, (int, float))
    }
    for name, value in passes[0].items():
        if isinstance(value, int):
            numbers[name] = round(numbers[name])
    result: dict[str, Any] = {
        "variant": variant.name,
        "model": shape.name,
        "dtype": shape.dtype,
        "workload": workload.name,
        "workload_hash": workload.digest,
        "num_cut": workload.num_cut,
        **numbers,
        "errors": passes[-1]["errors"],
        "spread": spread([p["duration"] for p in passes]),
        "durations": [p["duration"] for p in passes],
    }
    last = variant.timings[-len(workload.requests) :]
    if shape.cost is not None:
        cost = RunCost.of(shape.cost, last)
        seconds = result["duration"]
        limit = cost.serial_seconds(limits, shape.dtype, max_rows)
        result |= cost.shares(
            limits, shape.dtype, seconds=seconds, steps=result["steps"]
        )
        result["share_of_serial_limit"] = limit / seconds
    result["limit_bandwidth_gb_s"] = limits.bandwidth / 1e9
    result["limit_gflop_s"] = limits.matrix_rate(shape.dtype) / 1e9
    return result


def _max_rows(llm: Any, workload: Workload) -> int:
    rows = sum(engine.scheduler.config.max_num_seqs for engine in engines_of(llm))
    return min(rows, len(workload.requests))


def _print(result: dict[str, Any]) -> None:
    report.print_lines(result["variant"], result, report.LOAD)
    report.print_latencies(result)
    report.print_lines("limits", result, report.SHARES)
    report.print_lines("engine", result, ENGINE_LINES)
    print(f"  {'spread of the passes':<{report.LABEL_WIDTH}} {result['spread']:.1%}")
    if result["num_cut"]:
        print(f"  {result['num_cut']} requests were cut to the context length")


def _draw(path: str, variants: Sequence[Variant]) -> None:
    first = {v.name: [t.ttft for t in v.timings if t.is_complete] for v in variants}
    whole = {v.name: [t.e2el for t in v.timings if t.is_complete] for v in variants}
    plot.draw(
        path,
        [
            plot.distribution_panel("time to first token", first),
            plot.distribution_panel("end to end", whole),
        ],
    )
