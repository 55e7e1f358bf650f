"""What `deterministic=True` costs on a CPU: both engines in turns, in one process.

    python -m benchmarks.determinism [--dtype bfloat16] [--cases 1 8 32 mixed]

Random weights of a llama of 120 M parameters. A decode case times steps of so many
rows, the mixed one prompts of 16 to 480 tokens that are served while others decode.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks import record
from benchmarks.cpu_products import SHAPES
from jllm.config import EngineConfig
from jllm.engine.create import create_engine
from jllm.engine.engine import Engine
from jllm.types import EngineRequest, SamplingParams

SHAPE = "llama-120m"
PROMPT, STEPS, MAX_ROWS = 128, 4, 32
NAMES = ("normal", "deterministic")


def make_engine(dtype: str, *, deterministic: bool) -> Engine:
    """An engine with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(SHAPES[SHAPE]))
        engine = create_engine(
            EngineConfig(
                model=folder,
                load_format="random",
                skip_tokenizer_init=True,
                dtype=dtype,  # pyright: ignore[reportArgumentType]
                max_model_len=1024,
                max_num_seqs=MAX_ROWS,
                num_blocks=MAX_ROWS * 64,
                enable_prefix_caching=False,
                compile_ahead=False,
                deterministic=deterministic,
            )
        )
    assert isinstance(engine, Engine)
    return engine


def add(engine: Engine, lengths: list[int], tokens: int) -> None:
    """Queues greedy requests of random tokens."""
    rng = np.random.default_rng(len(lengths))
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for index, length in enumerate(lengths):
        ids = rng.integers(3, 30000, length).tolist()
        engine.add(EngineRequest(f"{tokens}-{index}", ids, params))


def decode_seconds(engines: list[Engine], rows: int, turns: int) -> list[list[float]]:
    """Seconds of some steps of `rows` rows, of each engine in turn."""
    for engine in engines:
        engine.programs.get("decode", rows)
        add(engine, [PROMPT] * rows, (turns + 2) * (STEPS + 1) + 16)
        while engine.scheduler.num_waiting or engine.scheduler.num_running < rows:
            engine.step()
        for _ in range(STEPS):
            engine.step()
    seconds: list[list[float]] = []
    for _ in range(turns):
        seconds.append([])
        for engine in engines:
            engine.step()  # Fills the pipeline again.
            start = time.perf_counter()
            for _ in range(STEPS):
                engine.step()
            jax.block_until_ready(engine.state)
            seconds[-1].append((time.perf_counter() - start) / STEPS)
    for engine in engines:
        while engine.has_unfinished:
            engine.step()
    return seconds


def mixed_seconds(engines: list[Engine], turns: int) -> list[list[float]]:
    """Seconds of a workload of prompts and single tokens, of each engine in turn."""
    lengths = np.random.default_rng(0).integers(16, 480, 8).tolist()

    def serve(engine: Engine) -> float:
        start = time.perf_counter()
        add(engine, lengths, 12)
        while engine.has_unfinished:
            engine.step()
        return time.perf_counter() - start

    for engine in engines:
        engine.programs.get("decode", 8)
        engine.programs.get("prefill", 64)
        engine.programs.get("prefill", 256)
        serve(engine)
    return [[serve(engine) for engine in engines] for _ in range(turns)]


def main() -> None:
    """Runs the benchmark, prints its rows and appends them to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cases", nargs="+", default=["1", "8", "32", "mixed"])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    options = parser.parse_args()
    engines = [make_engine(options.dtype, deterministic=d) for d in (False, True)]
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        if case == "mixed":
            seconds = mixed_seconds(engines, options.turns)
        else:
            seconds = decode_seconds(engines, int(case), options.turns)
        medians = [statistics.median(side) for side in zip(*seconds, strict=True)]
        ratios = [slow / fast for fast, slow in seconds]
        rows.append(
            {
                "model": SHAPE,
                "dtype": options.dtype,
                "case": case if case == "mixed" else f"decode-{case}",
                **{
                    f"{name}_ms": round(1e3 * median, 2)
                    for name, median in zip(NAMES, medians, strict=True)
                },
                "ratio": round(statistics.median(ratios), 2),
                "least_ratio": round(min(ratios), 2),
                "most_ratio": round(max(ratios), 2),
                "turns": options.turns,
            }
        )
        print(rows[-1], flush=True)
        if not options.dry_run:
            record.append("determinism", rows[-1:])
    for engine in engines:
        engine.close()


if __name__ == "__main__":
    main()
