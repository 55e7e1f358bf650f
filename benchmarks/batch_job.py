"""Throughput of `jllm batch` against `LLM.generate` on the same prompts.

    python -m benchmarks.batch_job [--shape embedded wide] [--lines 256] [--turns 3]

Both take turns in one process, each with a model of its own that is loaded and compiled
before; prefix caches are emptied. The time of the batch job is that of the whole
command without loading the model: reading and hashing the input, claims, journal,
synchronising to the disk, and the merge. `embedded` is bound by the host on CPU; `wide`
has random weights of a size whose steps are bound by the products, as on accelerators.
"""

import argparse
import asyncio
import contextlib
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import record
from jllm import LLM, AsyncLLM, EngineConfig, SamplingParams
from jllm.engine.create import DEFAULT_MODEL
from server.batch.options import BatchOptions
from server.batch.process import run_batch

ROWS = 32
NUM_BLOCKS = 2048
WIDE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": json.loads((DEFAULT_MODEL / "config.json").read_text())["vocab_size"],
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
TEXT = "the little girl boy cat dog went saw tree park and was happy sad big red"


class Kept:
    """A loaded model that a job may use and not shut down."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def shutdown(self) -> None:
        """Leaves it as it is."""


@contextlib.contextmanager
def engine_config(shape: str) -> Iterator[EngineConfig]:
    """The engine's options for a shape."""
    # Rows are full all the time: two programs do, and blocks for what can run.
    common: dict[str, Any] = {
        "max_num_seqs": ROWS,
        "dtype": "float32",
        "compile_ahead": False,
        "num_blocks": NUM_BLOCKS,
    }
    if shape == "embedded":
        yield EngineConfig(**common)
        return
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(WIDE))
        yield EngineConfig(
            model=folder, tokenizer=str(DEFAULT_MODEL), load_format="random", **common
        )


def make_prompts(count: int, seed: int) -> list[str]:
    """Prompts of 8 to 64 words."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(8, 64, count)
    return [" ".join(rng.choice(TEXT.split(), size)) for size in sizes]


def run_job(config: EngineConfig, llm: Kept, prompts: list[str], body: dict) -> float:
    """Seconds of a job over the prompts."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "in.txt"
        path.write_text("".join(prompt + "\n" for prompt in prompts))
        options = BatchOptions(
            inputs=[str(path)], output=f"{folder}/out", body=body, worker_id="bench"
        )
        began = time.perf_counter()
        code = run_batch(config, options, lambda _: llm, has_signals=False)
        seconds = time.perf_counter() - began
        assert code == 0
        done = json.loads((pathlib.Path(folder) / "out" / "done.json").read_text())
        assert (done["lines"], done["errors"]) == (len(prompts), 0)
        assert done["output_tokens"] == len(prompts) * body["max_tokens"]
    return seconds


def measure(shape: str, num_lines: int, num_tokens: int, turns: int) -> dict[str, Any]:
    """Takes turns; returns medians and their ratio."""
    body = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    params = SamplingParams(**body)
    times: dict[str, list[float]] = {"generate": [], "batch": []}
    with engine_config(shape) as config:
        # In the event loop of each job; nothing is open between them.
        asynchronous = AsyncLLM.from_engine_config(config)
        with LLM.from_engine_config(config) as llm:
            llm.wait_until_compiled()
            asynchronous._engine.wait_until_compiled()
            for turn in range(turns + 1):
                count = num_lines if turn else ROWS
                prompts = make_prompts(count, turn)
                llm.reset_prefix_cache()
                asyncio.run(asynchronous.reset_prefix_cache())
                began = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                generated = time.perf_counter() - began
                seconds = run_job(config, Kept(asynchronous), prompts, body)
                print(f"{shape}: {generated:.2f} s, batch {seconds:.2f} s", flush=True)
                if turn:
                    times["generate"].append(generated)
                    times["batch"].append(seconds)
        asynchronous.shutdown()
    ratios = [a / b for a, b in zip(times["generate"], times["batch"], strict=True)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    total = num_lines * num_tokens
    return {
        "shape": shape,
        "lines": num_lines,
        "output_tokens": num_tokens,
        "rows": ROWS,
        "turns": turns,
        "generate_tokens_per_second": round(total / medians["generate"], 1),
        "batch_tokens_per_second": round(total / medians["batch"], 1),
        "batch_of_generate": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def main() -> None:
    """Runs the benchmark, prints its rows and appends them to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["embedded", "wide"])
    parser.add_argument("--lines", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    rows = [
        measure(shape, options.lines, options.tokens, options.turns)
        for shape in options.shape
    ]
    for row in rows:
        print(row)
    if options.record:
        record.append("batch_job", rows)


if __name__ == "__main__":
    main()
