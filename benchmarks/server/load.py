"""Many streams at once, far too many requests at once, and the server beside `LLM`.

python -m benchmarks.server.load streams overload offline --record
python -m benchmarks.server.load closed --minutes 10 --record

Client and server share the machine. Their processor time is told apart: `cpu_s`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import record
from benchmarks.server.client import Answer, percentile, send_all
from benchmarks.server.process import Server, serving

MODEL = "jllm"
PROMPT = "Once upon a time there was a little"
STREAMS, STREAM_TOKENS = 256, 64
REQUESTS, CAP, ACCEPTED_TOKENS = 10_000, 512, 256
SPREAD = 20.0
"""Seconds over which the requests come that do not come at once."""
OFFLINE_PROMPTS, OFFLINE_TOKENS, ROUNDS = 256, 128, 3
INTERVAL = 8
"""Tokens of a chunk where streams are to cost little."""
PERIOD = 0.01
"""Seconds between two looks of the client that costs little."""
TURNS = "jllm:event_loop_turn_seconds"


def body(tokens: int, index: int = 0, *, stream: bool = True) -> dict[str, Any]:
    """A request of a fixed number of tokens, each with a prompt of its own."""
    more = {"stream": True, "stream_options": {"include_usage": True}}
    return {
        "model": MODEL,
        "prompt": f"{PROMPT} cat number {index}",
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        **(more if stream else {}),
    }


def bodies(
    count: int, tokens: int, *, stream: bool = True, **fields: Any
) -> list[dict[str, Any]]:
    """That many of them."""
    return [body(tokens, i, stream=stream) | fields for i in range(count)]


def milliseconds(values: list[float]) -> dict[str, float | None]:
    """Median and 99th percentile."""
    if not values:
        return {"p50": None, "p99": None}
    return {
        "p50": round(1e3 * percentile(values, 0.5), 1),
        "p99": round(1e3 * percentile(values, 0.99), 1),
    }


class Watch:
    """What both sides spend in a part of a run, and how long the server's turns are."""

    def __init__(self, server: Server) -> None:
        """Begins."""
        self._server = server
        self._turns = server.histogram(TURNS)
        self._began = server.cpu_seconds, time.process_time()

    def result(self) -> dict[str, Any]:
        """What was spent since."""
        server, client = self._began
        spent = {
            "server": self._server.cpu_seconds - server,
            "client": time.process_time() - client,
        }
        turns = {
            bound: count - self._turns[bound]
            for bound, count in self._server.histogram(TURNS).items()
        }
        total = max(turns.values())
        below = {
            f"turns_{name}_ms_at_most": min(
                1e3 * bound for bound, count in turns.items() if count >= share * total
            )
            for name, share in (("p99", 0.99), ("longest", 1.0))
        }
        return {"cpu_s": {k: round(v, 2) for k, v in spent.items()}, **below}


def gaps(answers: list[Answer]) -> list[float]:
    """Seconds between two tokens of a stream."""
    return [b - a for x in answers for a, b in zip(x.times, x.times[1:], strict=False)]


def streams() -> dict[str, Any]:
    """256 concurrent streams of 64 tokens: no error, all tokens."""
    with serving("--max-num-queued-reqs", str(STREAMS)) as server:
        send_all(server.port, bodies(64, 16))
        watch = Watch(server)
        answers, seconds = send_all(server.port, bodies(STREAMS, STREAM_TOKENS))
        spent = watch.result()
    good = [a for a in answers if a.status == 200 and a.tokens == STREAM_TOKENS]
    return {
        "case": f"{STREAMS} streams of {STREAM_TOKENS} tokens",
        "errors": len(answers) - len(good),
        "first_error": next((a.error for a in answers if a.error), None),
        "tokens_per_second": sum(a.tokens for a in good) / seconds,
        "ttft_ms": milliseconds([a.times[0] for a in good]),
        "itl_ms": milliseconds(gaps(good)),
        **spent,
    }


def closed(minutes: float) -> dict[str, Any]:
    """256 streams of 64 tokens, each followed by the next, for some minutes."""
    with serving("--max-num-queued-reqs", str(STREAMS)) as server:
        send_all(server.port, bodies(64, 16))
        watch = Watch(server)
        end, errors, streams, tokens = time.monotonic() + 60 * minutes, [], 0, 0
        while time.monotonic() < end:
            answers, _ = send_all(server.port, bodies(STREAMS, STREAM_TOKENS))
            good = [a for a in answers if a.ends_well and a.tokens == STREAM_TOKENS]
            errors += [
                a.error or f"status {a.status}" for a in answers if a not in good
            ]
            streams += len(good)
            tokens += sum(a.tokens for a in good)
        spent = watch.result()
    return {
        "case": f"{STREAMS} streams of {STREAM_TOKENS} tokens, again and again",
        "minutes": minutes,
        "streams": streams,
        "errors": len(errors),
        "first_error": next(iter(errors), None),
        "tokens_per_second": tokens / (60 * minutes),
        **spent,
        "passed": not errors and spent["turns_p99_ms_at_most"] <= 50,
    }


def overload() -> dict[str, Any]:
    """10,000 requests with room for 512, at once and within twenty seconds."""
    asked = bodies(REQUESTS, ACCEPTED_TOKENS)
    with serving("--max-num-queued-reqs", str(CAP)) as server:
        send_all(server.port, bodies(64, 16))
        # What it does when nobody has to be refused, for the ratio.
        calm, calm_seconds = send_all(server.port, bodies(CAP, ACCEPTED_TOKENS))
        rate = _rate(calm, calm_seconds)
        before = server.resources()
        rows = {
            name: _shed(server, asked, spread, rate)
            for name, spread in (("at_once", 0.0), (f"within_{SPREAD:.0f}_s", SPREAD))
        }
        after = server.resources()
    return {
        "case": f"{REQUESTS} requests of {ACCEPTED_TOKENS} tokens, room for {CAP}",
        "unshed_tokens_per_second": rate,
        "unshed_itl_ms": milliseconds(gaps(calm)),
        **rows,
        "rss_growth_mib": after.rss_mib - before.rss_mib,
        "files_growth": after.files - before.files,
    }


def _rate(answers: list[Answer], seconds: float) -> float:
    return sum(a.tokens for a in answers) / seconds


def _shed(
    server: Server, asked: list[dict[str, Any]], spread: float, calm: float
) -> dict[str, Any]:
    """What became of requests of which most were refused."""
    num_logged = len(server.log_entries())
    watch = Watch(server)
    answers, seconds = send_all(server.port, asked, spread=spread)
    spent = watch.result()
    accepted = [a for a in answers if a.status == 200]
    refused = [a for a in answers if a.status == 429]
    complete = sum(a.tokens == ACCEPTED_TOKENS and not a.error for a in accepted)
    handled = [
        1e-3 * entry["total_ms"]
        for entry in server.log_entries()[num_logged:]
        if entry["status"] == 429
    ]
    return {
        "accepted": len(accepted),
        "accepted_complete": complete,
        "refused": len(refused),
        "other": len(answers) - len(accepted) - len(refused),
        # From the request's head to the answer, but for the turn in which it came.
        "refusal_in_server_ms": milliseconds(handled),
        "refusal_ms": milliseconds([a.seconds for a in refused]),
        "refusals_took_s": max((a.seconds for a in refused), default=0.0),
        "itl_ms": milliseconds(gaps(accepted)),
        "seconds": seconds,
        "throughput_of_unshed": _rate(accepted, seconds) / calm,
        **spent,
    }


def offline() -> dict[str, Any]:
    """The same prompts through the server and through `LLM.generate`, in turn."""
    from jllm import LLM, SamplingParams

    prompts = [body(OFFLINE_TOKENS, i)["prompt"] for i in range(OFFLINE_PROMPTS)]
    params = SamplingParams(max_tokens=OFFLINE_TOKENS, temperature=0, ignore_eos=True)
    ways: Mapping[str, Mapping[str, Any]] = {
        "whole": {"stream": False},
        "streamed": {},
        f"streamed_by_{INTERVAL}": {"stream_interval": INTERVAL},
    }
    rows: dict[str, list[dict[str, float]]] = {"offline": []} | {w: [] for w in ways}
    flags = ("--max-num-queued-reqs", str(OFFLINE_PROMPTS))
    with serving(*flags) as server, LLM() as llm:

        def generate() -> float:
            began = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - began

        for round_ in range(ROUNDS + 1):
            found = {"offline": _measured(server, generate)}
            for way, fields in ways.items():
                asked = bodies(OFFLINE_PROMPTS, OFFLINE_TOKENS, **fields)
                found[way] = _measured(server, lambda a=asked: _served(server, a))
            if round_:  # the first warms up: compilation, prefix cache
                for name, row in found.items():
                    rows[name].append(row)
    return {
        "case": f"{OFFLINE_PROMPTS} requests of {OFFLINE_TOKENS} tokens",
        **_compared(rows),
    }


def _served(server: Server, asked: list[dict[str, Any]]) -> float:
    answers, seconds = send_all(server.port, asked, period=PERIOD)
    if any(answer.tokens != OFFLINE_TOKENS for answer in answers):
        raise ValueError("an answer is not whole")
    return seconds


def _measured(server: Server, run: Callable[[], float]) -> dict[str, float]:
    """Seconds and processor seconds of both sides."""
    before, own = server.cpu_seconds, time.process_time()
    seconds = run()
    return {
        "seconds": seconds,
        "server": server.cpu_seconds - before,
        "client": time.process_time() - own,
    }


def _compared(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Every way beside offline: by the clock, and by processor time without clients."""
    means = {
        name: {key: statistics.mean(row[key] for row in found) for key in found[0]}
        for name, found in rows.items()
    }
    total = OFFLINE_PROMPTS * OFFLINE_TOKENS
    alone = means["offline"]
    result: dict[str, Any] = {
        "tokens_per_second": {k: total / mean["seconds"] for k, mean in means.items()},
        "of_offline": {},
        "of_offline_per_processor_second": {},
        "cpu_us_per_token": {"offline": 1e6 * alone["client"] / total},
        "client_cpu_us_per_token": {},
        "rounds_s": {k: [round(r["seconds"], 2) for r in v] for k, v in rows.items()},
    }
    for name, mean in means.items():
        if name != "offline":
            result["of_offline"][name] = alone["seconds"] / mean["seconds"]
            ratio = alone["client"] / mean["server"]
            result["of_offline_per_processor_second"][name] = ratio
            result["cpu_us_per_token"][name] = 1e6 * mean["server"] / total
            result["client_cpu_us_per_token"][name] = 1e6 * mean["client"] / total
    return result


def main() -> None:
    """Runs the cases named on the command line."""
    cases = {"streams": streams, "overload": overload, "offline": offline}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "cases", nargs="*", default=list(cases), choices=[*cases, "closed", []]
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of case closed")
    parser.add_argument("--record", action="store_true", help="append to results/")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.cases:
        case = cases.get(name)
        row = {"kind": name, **(case() if case else closed(arguments.minutes))}
        print(json.dumps(row, indent=1))
        rows.append(row)
    if arguments.record:
        record.append("server_load", rows)


if __name__ == "__main__":
    main()
