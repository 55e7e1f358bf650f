"""Measures how many KV slots the scheduler reserves without using them.

Replays the prompt and output lengths of a trace through the scheduler with a device
that does nothing. After every step, a block of the pool that is in some table has its
slots reserved; those whose KV has been computed are in use. The figure is the rest as a
share of the slots in use, averaged over the steps. The goal is the 4 % of the
PagedAttention paper (Kwon et al., 2023, arXiv:2309.06180).

    python -m benchmarks.kv_waste --trace AzureLLMInferenceTrace_conv.csv

The trace is a CSV file with the columns ContextTokens and GeneratedTokens, as in
Microsoft's Azure LLM inference traces of 2023. Without one, lengths are drawn from
log-normal distributions of similar means.
"""

import argparse
import csv
import dataclasses
import json
import math
import pathlib
import random
import statistics
from collections.abc import Iterator

from benchmarks import record
from jllm.config import SchedulerConfig
from jllm.scheduler.request import Request
from jllm.scheduler.scheduler import Scheduler

GOAL_PERCENT = 4.0
FILLER_TOKEN = 0


def trace_lengths(path: pathlib.Path) -> list[tuple[int, int]]:
    """Reads prompt and output lengths, in order of arrival."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        return [(int(r["ContextTokens"]), int(r["GeneratedTokens"])) for r in rows]


def synthetic_lengths(count: int, seed: int) -> list[tuple[int, int]]:
    """Draws log-normal lengths with means of about 1,150 and 210 tokens."""
    rng = random.Random(seed)
    return [
        (
            round(rng.lognormvariate(6.6, 0.95)) + 1,
            round(rng.lognormvariate(5.0, 0.83)) + 1,
        )
        for _ in range(count)
    ]


def requests(lengths: list[tuple[int, int]], max_model_len: int) -> Iterator[Request]:
    """Makes requests of distinct content, cut to the context length."""
    for number, (prompt, output) in enumerate(lengths):
        output = min(max(output, 1), max_model_len - 1)
        prompt = min(max(prompt, 1), max_model_len - output)
        yield Request(
            sequence_id=number,
            request_id=str(number),
            index=0,
            prompt_token_ids=(number + 1, *[FILLER_TOKEN] * (prompt - 1)),
            max_tokens=output,
            arrival=number,
        )


@dataclasses.dataclass
class Samples:
    """What is measured after each step."""

    waste: list[float] = dataclasses.field(default_factory=list)
    running: list[int] = dataclasses.field(default_factory=list)
    pool_use: list[float] = dataclasses.field(default_factory=list)


def replay(config: SchedulerConfig, lengths: list[tuple[int, int]]) -> dict[str, float]:
    """Runs all requests, keeping the queue full; returns the figures."""
    scheduler, samples = Scheduler(config), Samples()
    source = requests(lengths, config.max_model_len)
    previous, more = None, True
    while more or scheduler.has_unfinished:
        while more and scheduler.num_waiting < config.max_num_seqs:
            request = next(source, None)
            more = request is not None
            if request is not None:
                scheduler.add(request)
        plan = scheduler.schedule()
        if plan is not None:
            measure(scheduler, config, samples)
        if previous is not None:
            scheduler.commit(previous, [FILLER_TOKEN] * previous.num_rows)
        previous = plan
    return {
        "requests": len(lengths),
        "steps": len(samples.waste),
        "waste_percent": round(100 * statistics.fmean(samples.waste), 3),
        "waste_percent_p99": round(
            100 * statistics.quantiles(samples.waste, n=100)[98], 3
        ),
        "mean_running": round(statistics.fmean(samples.running), 1),
        "mean_pool_use_percent": round(100 * statistics.fmean(samples.pool_use), 1),
        "preemptions": scheduler.num_preemptions,
    }


def measure(scheduler: Scheduler, config: SchedulerConfig, samples: Samples) -> None:
    """Notes slots in use and reserved; a block set aside is reserved too."""
    running = scheduler.running
    used = sum(scheduler.num_computed_tokens(request) for request in running)
    blocks = sum(len(r.block_ids) + r.num_reserved_blocks for r in running)
    samples.waste.append((blocks * config.block_size - used) / used)
    samples.running.append(len(running))
    samples.pool_use.append(blocks / config.num_blocks)


def main() -> None:
    """Runs the benchmark, appends its figures to the results and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=pathlib.Path, help="CSV file of lengths")
    parser.add_argument("--requests", type=int, default=20000, help="most requests")
    parser.add_argument(
        "--seed", type=int, default=0, help="of lengths without a trace"
    )
    parser.add_argument("--num-blocks", type=int, default=16384)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--token-budget", type=int, default=4096)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--results", type=pathlib.Path, default=record.RESULTS)
    options = parser.parse_args()
    config = SchedulerConfig(
        max_num_seqs=options.max_num_seqs,
        token_budget=options.token_budget,
        block_size=options.block_size,
        num_blocks=options.num_blocks,
        max_model_len=options.max_model_len,
        max_block_appends=math.ceil(
            (options.max_model_len + options.token_budget) / options.block_size
        )
        + options.max_num_seqs,
    )
    if options.trace is None:
        lengths = synthetic_lengths(options.requests, options.seed)
    else:
        lengths = trace_lengths(options.trace)[: options.requests]
    figures = {
        "workload": options.trace.name
        if options.trace
        else f"lognormal {options.seed}",
        "config": dataclasses.asdict(config),
        "goal_percent": GOAL_PERCENT,
        **replay(config, lengths),
    }
    record.append("kv_waste", [figures], folder=options.results)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
