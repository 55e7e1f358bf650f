"""Decode and prefill steps of the whole engine, host included.

    python -m benchmarks.gpu.steps MODEL [--rows 1 8] [--contexts 512] [--steps 64]
        [--prefill 2048] [--label TEXT] [--trial]

Of each number of rows and context: milliseconds per step, share of the bandwidth that
reading the weights and the cache once would need, and, from a trace of the profiler,
launches per step and the share of the time in which the device did nothing. One line of
JSON per figure. `--label` names the setting, for example XLA's flags.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import record
from benchmarks.gpu import models
from benchmarks.gpu.trace import read_trace
from jllm import EngineConfig
from jllm.engine.create import create_engine
from jllm.types import EngineRequest, SamplingParams

BANDWIDTH = 4.3e12
"""Bytes per second of a copy on an H200; MBU is the share of it."""
MATRIX_RATE = 790e12
"""bfloat16 operations per second of a large product on an H200."""
TRACED_STEPS = 16


def add(engine: Any, rows: int, context: int, steps: int, turn: int) -> None:
    """Adds requests whose prompts are new, so that no cached prefix helps."""
    rng = np.random.default_rng(turn)
    for i in range(rows):
        prompt = tuple(rng.integers(3, engine.limits.vocab_size, context).tolist())
        params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
        engine.add(EngineRequest(f"{turn}-{i}", prompt, params))


def drain(engine: Any) -> None:
    """Steps until nothing is left."""
    while engine.has_unfinished:
        engine.step()


def decode_row(
    engine: Any, model: str, rows: int, context: int, steps: int
) -> dict[str, Any]:
    """Times of decode steps with every row at about `context`."""
    turn = rows * 10**6 + context
    add(engine, rows, context, steps + TRACED_STEPS + 24, turn)
    prefill = -(-rows * context // 64) + 4
    for _ in range(prefill):  # until every row decodes
        engine.step()
        if not engine.scheduler.num_waiting and _all_decode(engine):
            break
    times: list[float] = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(TRACED_STEPS):
                engine.step()
            jax.block_until_ready(engine.state)
        use = read_trace(pathlib.Path(folder))
    drain(engine)
    seconds = statistics.fmean(times)
    read = models.weight_bytes(model) + rows * context * models.kv_bytes(model)
    return {
        "step": "decode",
        "rows": rows,
        "context": context,
        "milliseconds": round(1e3 * seconds, 4),
        "median_milliseconds": round(1e3 * statistics.median(times), 4),
        "tokens_per_second": round(rows / seconds, 1),
        "mbu": round(read / seconds / BANDWIDTH, 4),
        "launches_per_step": round(use.launches / TRACED_STEPS, 1),
        "device_idle_share": round(use.idle_share, 4),
    }


def _all_decode(engine: Any) -> bool:
    running = engine.scheduler.running
    return all(r.num_tokens - r.num_computed_tokens <= 1 for r in running)


def prefill_row(engine: Any, model: str, tokens: int) -> dict[str, Any]:
    """Seconds from a prompt to its first token, and the share of the matrix rate."""
    times: list[float] = []
    for turn in range(6):
        add(engine, 1, tokens, 1, 10**9 + tokens * 10 + turn)
        began = time.perf_counter()
        drain(engine)
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[1:])
    flops = models.weight_bytes(model, 2) * tokens  # two operations per weight
    return {
        "step": "prefill",
        "tokens": tokens,
        "milliseconds": round(1e3 * seconds, 3),
        "mfu": round(flops / seconds / MATRIX_RATE, 4),
    }


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All figures of one model."""
    with tempfile.TemporaryDirectory() as folder:
        path = models.config_folder(options.model, pathlib.Path(folder))
        longest = max([*options.contexts, *options.prefill]) + options.steps + 64
        config = EngineConfig(
            model=str(path),
            load_format="random",
            max_model_len=longest,
            max_num_seqs=max(options.rows),
            num_blocks=options.num_blocks,
        )
        engine: Any = create_engine(config)
        engine.wait_until_compiled()
        found: list[dict[str, Any]] = []
        for rows in options.rows:
            for context in options.contexts:
                tokens = rows * (context + options.steps + 64)
                if tokens <= engine.scheduler.pool.num_blocks * 16:
                    found.append(
                        decode_row(engine, options.model, rows, context, options.steps)
                    )
                else:
                    print(f"left out: {rows} rows of {context} do not fit the pool")
        found += [prefill_row(engine, options.model, n) for n in options.prefill]
        engine.close()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints and records the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=models.SHAPES)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--num-blocks", type=int)
    parser.add_argument("--label", default="")
    parser.add_argument("--trial", action="store_true", help="record nothing")
    options = parser.parse_args(arguments)
    rows = run(options)
    facts = {"model": options.model, "engine": "jllm", "setting": options.label}
    for row in rows:
        print(json.dumps(facts | row), flush=True)
    if not options.trial:
        record.append("gpu_steps", [facts | row for row in rows])


if __name__ == "__main__":
    main()
