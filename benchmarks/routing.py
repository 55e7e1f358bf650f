"""Measures how much of the prompts each way of routing finds in the prefix cache.

Replays a trace of the Mooncake format (JSON lines with timestamp in milliseconds,
input_length, output_length and hash_ids, one for 512 tokens of prompt) on replicas with
real schedulers and a device that does nothing: every tick each replica takes one step.
All lengths are divided by 32, so that a hash id is one block of 16 tokens. Requests
arrive at their time, so many ticks for a second of the trace; the pace decides how full
the replicas are, and is chosen such that the busiest are near what they can do.

    python -m benchmarks.routing --trace conversation_trace.jsonl
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence

from benchmarks import record
from jllm.config import SchedulerConfig
from jllm.scheduler.plan import StepPlan
from jllm.scheduler.request import Request
from jllm.scheduler.routing import ReplicaRouter
from jllm.scheduler.scheduler import Scheduler

SCALE = 32
BLOCK_SIZE = 512 // SCALE
MAX_MODEL_LEN = 8192
TOKEN = 0

Route = Callable[[Request, Sequence[int]], int]


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """One line of the trace.

    Attributes:
        tick: When it arrives.
        request: What is asked.
    """

    tick: float
    request: Request


def read_trace(
    path: pathlib.Path, count: int, ticks_per_second: float
) -> list[Arrival]:
    """Reads requests; equal hash ids become blocks of equal tokens."""
    arrivals: list[Arrival] = []
    with path.open() as file:
        for number, line in zip(range(count), file, strict=False):
            fields = json.loads(line)
            length = max(1, fields["input_length"] // SCALE)
            tokens = [n + 1 for n in fields["hash_ids"] for _ in range(BLOCK_SIZE)]
            request = Request(
                sequence_id=number,
                request_id=str(number),
                index=0,
                prompt_token_ids=tuple(tokens[:length]),
                max_tokens=max(1, fields["output_length"] // SCALE),
                arrival=number,
            )
            tick = fields["timestamp"] / 1000 * ticks_per_second
            arrivals.append(Arrival(tick, request))
    return arrivals


class Replica:
    """A scheduler and the step that its device has under way."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Starts idle."""
        self.scheduler = Scheduler(config)
        self.num_open = 0
        self.busy_ticks = 0
        self._under_way: StepPlan | None = None

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.scheduler.add(request)
        self.num_open += 1

    def tick(self) -> Iterator[Request]:
        """Takes a step; yields the requests that got their first token."""
        plan = self.scheduler.schedule()
        self.busy_ticks += plan is not None
        done, self._under_way = self._under_way, plan
        if done is not None:
            updates = self.scheduler.commit(done, [TOKEN] * done.num_rows)
            for update in updates.others:
                self.num_open -= update.finish_reason is not None
                if update.request.num_output_tokens == 1:
                    yield update.request


def replay(
    arrivals: Sequence[Arrival], replicas: list[Replica], route: Route
) -> list[float]:
    """Runs the trace; returns the ticks from each arrival to its first token."""
    waits: list[float] = []
    arrived = {arrival.request.request_id: arrival.tick for arrival in arrivals}
    tick, position = 0, 0
    while position < len(arrivals) or any(replica.num_open for replica in replicas):
        while position < len(arrivals) and arrivals[position].tick <= tick:
            request = arrivals[position].request
            replicas[route(request, [r.num_open for r in replicas])].add(request)
            position += 1
        tick += 1
        for replica in replicas:
            started = replica.tick()
            waits += [tick - arrived[request.request_id] for request in started]
    return waits


def routes(num_replicas: int, num_blocks: int) -> dict[str, Route]:
    """The ways of routing that are compared."""
    router = ReplicaRouter(num_replicas, BLOCK_SIZE, num_blocks)
    return {
        "round robin": lambda request, _: request.arrival % num_replicas,
        "least loaded": lambda _, loads: loads.index(min(loads)),
        "prefix": lambda request, loads: router.route(request.prompt_token_ids, loads),
    }


def main() -> None:
    """Runs the benchmark, appends its figures to the results and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=pathlib.Path, required=True)
    parser.add_argument("--requests", type=int, default=20000, help="most requests")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--num-blocks", type=int, default=4096, help="per replica")
    parser.add_argument("--token-budget", type=int, default=256)
    parser.add_argument("--ticks-per-second", type=float, default=5.0)
    parser.add_argument("--results", type=pathlib.Path, default=record.RESULTS)
    options = parser.parse_args()
    config = SchedulerConfig(
        max_num_seqs=32,
        token_budget=options.token_budget,
        block_size=BLOCK_SIZE,
        num_blocks=options.num_blocks,
        max_model_len=MAX_MODEL_LEN,
        max_block_appends=(MAX_MODEL_LEN + options.token_budget) // BLOCK_SIZE + 32,
    )
    rows: list[dict[str, object]] = []
    for name, route in routes(options.replicas, options.num_blocks).items():
        # Anew for each, since a request is used up.
        arrivals = read_trace(options.trace, options.requests, options.ticks_per_second)
        replicas = [Replica(config) for _ in range(options.replicas)]
        waits = replay(arrivals, replicas, route)
        hits = sum(r.scheduler.num_prefix_hits for r in replicas)
        queries = sum(r.scheduler.num_prefix_queries for r in replicas)
        busy = [replica.busy_ticks for replica in replicas]
        rows.append(
            {
                "trace": options.trace.name,
                "routing": name,
                "requests": len(arrivals),
                "replicas": options.replicas,
                "blocks_per_replica": options.num_blocks,
                "ticks_per_second": options.ticks_per_second,
                "hit_percent": round(100 * hits / queries, 2),
                "ttft_ticks_p50": round(statistics.median(waits), 1),
                "ttft_ticks_p99": round(statistics.quantiles(waits, n=100)[98], 1),
                "busiest_of_mean": round(max(busy) / statistics.fmean(busy), 3),
            }
        )
    record.append("routing", rows, folder=options.results)
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
