"""Runs jllm and other engines on the same checkpoint and requests, in turns.

    python -m benchmarks.peers.compare --model llama-120m --cache FOLDER \\
        --dtype bfloat16 --requests 1 8 32 --peers jllm,transformers,llamacpp \\
        --peer-python llamacpp=/path/to/venv/bin/python

Every engine is a process of its own, in its own environment. They are opened one after
the other, warmed up once per load, and then take turns: A B C, A B C, with new tokens
in each round. Greedy, end tokens ignored, so that all make the same number of tokens;
the tokens themselves are compared with jllm's, with which those of float32 have to
agree. Medians of the rounds; the spread is (largest - smallest) / median.
`foreign_cores` says how many cores other processes kept busy meanwhile. An engine that
is not installed is left out by name.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import psutil

from benchmarks import record
from benchmarks.peers import checkpoints
from benchmarks.peers.worker import ADAPTERS
from jllm.bench.limits import ModelCost
from jllm.bench.report import print_table
from jllm.bench.statistics import percentile, spread
from jllm.bench.workload import Workload, WorkloadOptions, make_workload
from jllm.flags import add_flags, given_values

ROOT = pathlib.Path(__file__).parents[2]
PAUSE_SECONDS = 0.5
"""Between passes, for threads that still spin."""
WARMUP_TOKENS = 8
FIRST_REPETITION = 1000
"""Times the number of requests: of the repetition that warms up, others follow."""


class WorkerError(Exception):
    """A worker has ended or failed."""


@dataclasses.dataclass
class Worker:
    """One engine's process.

    Attributes:
        name: Of the engine.
        process: Its process.
        version: What it says of itself.
        open_seconds: From the start of the process until it was ready.
    """

    name: str
    process: subprocess.Popen[str]
    version: str = ""
    open_seconds: float = 0.0

    def ask(self, message: dict[str, Any] | None) -> dict[str, Any]:
        """Sends a message, if there is one, and waits for the next answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if message is not None:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise WorkerError(f"{self.name} ended with {code}; its words are above")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def start(name: str, python: str, settings: dict[str, Any], log: Any) -> Worker | None:
    """Opens an engine; None, with a word about it, where it is not installed."""
    threads = str(settings["threads"])
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "JAX_PLATFORMS": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [python, "-m", "benchmarks.peers.worker", name, json.dumps(settings)]
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    worker = Worker(name, process)
    try:
        answer = worker.ask(None)
    except WorkerError:
        worker.close()
        raise
    if "missing" in answer:
        print(f"{name}: left out, {answer['missing']}")
        worker.close()
        return None
    worker.version, worker.open_seconds = answer["ready"], time.monotonic() - began
    print(f"{name} {worker.version}: ready after {worker.open_seconds:.1f} s")
    return worker


def own_seconds(process: psutil.Process) -> float:
    """Processor time of a process and its children so far."""
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system
    return total


def resident_bytes(process: psutil.Process) -> int:
    """Memory of a process and its children; what they share counts for each."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += each.memory_info().rss
    return total


def busy_seconds() -> float:
    """Processor time of the whole machine so far."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice


def run_pass(worker: Worker, workload: Workload) -> dict[str, Any]:
    """One pass; the answer, with what other processes used meanwhile."""
    message = {
        "prompts": [list(r.prompt_token_ids) for r in workload.requests],
        "lengths": [r.max_tokens for r in workload.requests],
    }
    process = psutil.Process(worker.process.pid)
    time.sleep(PAUSE_SECONDS)
    own, busy, began = own_seconds(process), busy_seconds(), time.monotonic()
    answer = worker.ask(message)
    seconds = time.monotonic() - began
    foreign = (busy_seconds() - busy) - (own_seconds(process) - own)
    answer["foreign_cores"] = max(0.0, foreign / seconds)
    answer["rss_mb"] = resident_bytes(process) / 1e6
    return answer


def shortened(workload: Workload) -> Workload:
    """The same prompts with few output tokens, to warm up with."""
    requests = tuple(
        dataclasses.replace(r, max_tokens=min(r.max_tokens, WARMUP_TOKENS))
        for r in workload.requests
    )
    return dataclasses.replace(workload, requests=requests)


def agreement(answers: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Share of each engine's requests whose tokens are all those of the first."""
    first = next(iter(answers.values()))["tokens"]
    return {
        name: sum(a == b for a, b in zip(first, answer["tokens"], strict=True))
        / len(first)
        for name, answer in answers.items()
    }


def measure(
    workers: list[Worker],
    options: argparse.Namespace,
    workload_options: WorkloadOptions,
    deadline: float,
) -> list[dict[str, Any]]:
    """Rounds of one load, while there is time; one row for each engine."""

    def make(repetition: int) -> Workload:
        return make_workload(
            workload_options,
            vocab_size=options.config["vocab_size"],
            max_model_len=options.max_model_len,
            repetition=repetition,
        )

    # No load sees the tokens of another one, which a prefix cache would know.
    first = FIRST_REPETITION * workload_options.num_prompts
    warmup = shortened(make(first))
    for worker in workers:
        run_pass(worker, warmup)
    passes: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    same: list[dict[str, float]] = []
    workload = warmup
    for repetition in range(first + 1, first + 1 + options.rounds):
        began = time.monotonic()
        workload = make(repetition)
        for worker in workers:
            passes[worker.name].append(run_pass(worker, workload))
        same.append(agreement({name: each[-1] for name, each in passes.items()}))
        took = time.monotonic() - began
        if time.monotonic() + took > deadline:
            break
    return [
        row(worker, passes[worker.name], passes.get("jllm"), same, workload, options)
        for worker in workers
    ]


def row(
    worker: Worker,
    passes: list[dict[str, Any]],
    ours: list[dict[str, Any]] | None,
    same: list[dict[str, float]],
    workload: Workload,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What is recorded of an engine at one load."""
    seconds = [answer["seconds"] for answer in passes]
    median = percentile(seconds, 50)
    firsts = [f for answer in passes for f in answer["first"] if f]
    cached = [c for answer in passes for c in answer["cached"] if c is not None]
    result: dict[str, Any] = {
        "model": options.model,
        "dtype": options.dtype,
        "engine": worker.name,
        "version": worker.version,
        "workload": workload.name,
        "workload_hash": workload.digest,
        "requests": len(workload.requests),
        "threads": options.threads,
        "max_num_seqs": options.max_num_seqs,
        "rounds": len(passes),
        "seconds": [round(s, 4) for s in seconds],
        "output_tokens_per_second": round(workload.num_output_tokens / median, 2),
        "total_tokens_per_second": round(
            (workload.num_output_tokens + workload.num_prompt_tokens) / median, 2
        ),
        "spread": round(spread(seconds), 4),
        "median_ttft_ms": round(1000 * percentile(firsts, 50), 1) if firsts else None,
        "prefix_hit_rate": (
            round(sum(cached) / len(passes) / workload.num_prompt_tokens, 4)
            if cached
            else None
        ),
        "foreign_cores": round(max(a["foreign_cores"] for a in passes), 3),
        "rss_mb": round(max(a["rss_mb"] for a in passes)),
        "open_seconds": round(worker.open_seconds, 2),
        "same_tokens": min(shares[worker.name] for shares in same),
    }
    if ours is not None:
        # Round by round, since what slows one engine slows its neighbours too.
        ratios = [s / o["seconds"] for s, o in zip(seconds, ours, strict=True)]
        result["jllm_is_faster_by"] = round(percentile(ratios, 50), 3)
    if options.cost is not None and len(workload.requests) == 1:
        num_bytes = options.cost.weight_bytes * workload.num_output_tokens
        result["weight_gb_per_second"] = round(num_bytes / median / 1e9, 2)
    return result


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Prints what was measured at one load."""
    first = rows[0]
    print(
        f"\n{first['model']} {first['dtype']}: "
        f"{first['requests']} x {first['workload']}"
    )
    head = ["engine", "out tok/s", "jllm is faster by", "spread", "TTFT p50 ms"]
    head += ["hits", "same tokens", "foreign cores", "RSS MB", "rounds"]
    keys = ["engine", "output_tokens_per_second", "jllm_is_faster_by", "spread"]
    keys += ["median_ttft_ms", "prefix_hit_rate", "same_tokens", "foreign_cores"]
    keys += ["rss_mb", "rounds"]
    print_table(head, [["" if r.get(k) is None else r[k] for k in keys] for r in rows])


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", required=True, help=f"folder, or {', '.join(checkpoints.CONFIGS)}"
    )
    parser.add_argument("--cache", type=pathlib.Path, required=True, metavar="FOLDER")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--peers", default=",".join(ADAPTERS), metavar="NAME,...")
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="NAME=PATH"
    )
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-model-len", type=int, help="none: what the loads need")
    parser.add_argument(
        "--time-limit", type=float, default=420, help="seconds; no round starts later"
    )
    parser.add_argument("--log", default="/dev/null", help="what the engines say")
    parser.add_argument("--record", action="store_true", help="append to the results")
    add_flags(
        parser.add_argument_group("workload"),
        WorkloadOptions,
        leave_out=("num_prompts",),
    )
    options = parser.parse_args()
    names = options.peers.split(",")
    for name in names:
        if name not in ADAPTERS:
            parser.error(f"peer {name!r} must be one of {', '.join(ADAPTERS)}")
    # The first is the yardstick of the tokens.
    options.peers = sorted(names, key=lambda name: name != "jllm")
    pythons = dict(entry.partition("=")[::2] for entry in options.peer_python)
    unknown = set(pythons) - set(ADAPTERS)
    if unknown:
        parser.error(f"peer-python: {', '.join(unknown)} is no peer")
    options.pythons = {name: pythons.get(name, sys.executable) for name in names}
    return options


def main() -> None:
    """Runs the comparison, prints it, and records it if asked to."""
    options = parse()
    deadline = time.monotonic() + options.time_limit
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.model in checkpoints.CONFIGS:
        folder = checkpoints.checkpoint(options.model, options.cache)
    else:
        folder = pathlib.Path(options.model)
        options.model = folder.name
    options.config = json.loads((folder / "config.json").read_text())
    options.cost = ModelCost.from_config(options.config, options.dtype)
    given = given_values(options, WorkloadOptions)
    loads = [WorkloadOptions(**given, num_prompts=n) for n in options.requests]
    if options.max_model_len is None:
        options.max_model_len = longest(loads, options.config)
    settings = {
        "folder": str(folder.resolve()),
        "dtype": options.dtype,
        "threads": options.threads,
        "max_num_seqs": options.max_num_seqs,
        "max_model_len": options.max_model_len,
        "cache": str(options.cache.resolve()),
    }
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(pathlib.Path(options.log).open("a"))
        workers: list[Worker] = []
        for name in options.peers:
            try:
                worker = start(name, options.pythons[name], settings, log)
            except (WorkerError, OSError) as error:
                print(f"{name}: left out, {error}")
                continue
            if worker is not None:
                stack.callback(worker.close)
                workers.append(worker)
        for number, load in enumerate(loads):
            # What is left of the time is shared by the loads that are left.
            left = (deadline - time.monotonic()) / (len(loads) - number)
            rows = measure(workers, options, load, time.monotonic() + left)
            print_rows(rows)
            if options.record:
                record.append("peers", rows)


def longest(loads: list[WorkloadOptions], config: dict[str, Any]) -> int:
    """Most tokens of any request, in whole steps of 64."""
    limit = config["max_position_embeddings"]
    workloads = [
        make_workload(load, vocab_size=config["vocab_size"], max_model_len=limit)
        for load in loads
    ]
    most = max(
        len(request.prompt_token_ids) + request.max_tokens
        for workload in workloads
        for request in workload.requests
    )
    return min(limit, -(-most // 64) * 64)


if __name__ == "__main__":
    main()
