"""Offline throughput of the engine, and of transformers on the same checkpoint.

    python -m benchmarks.offline [--model FOLDER] [--requests 1 8 32] [--tokens 128]

Prompts are random tokens, outputs have a fixed length, decoding is greedy. The engine
and the peer take turns in one process, so that a slow spell of the machine meets both;
medians are compared. Loading, compilation and one warm-up turn are not timed. The peer
is left out where torch is not installed.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import record
from jllm import LLM, SamplingParams

Prompts = list[list[int]]
Run = Callable[[Prompts, int], None]


def engine_run(llm: LLM) -> Run:
    """Generates with jllm."""

    def run(prompts: Prompts, num_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        llm.reset_prefix_cache()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert all(len(out.outputs[0].token_ids) == num_tokens for out in outputs)

    return run


def transformers_run(folder: str) -> Run | None:
    """Generates with transformers, all prompts in one static batch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(prompts: Prompts, num_tokens: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
            )
        assert out.shape[1] == ids.shape[1] + num_tokens

    return run


def measure(
    runs: dict[str, Run], num_requests: int, num_tokens: int, vocab_size: int
) -> list[dict[str, Any]]:
    """Times every run in turn, five times after a warm-up."""
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(6):
        prompts = rng.integers(3, vocab_size, (num_requests, num_tokens)).tolist()
        for name, run in runs.items():
            start = time.perf_counter()
            run(prompts, num_tokens)
            if turn:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "engine": name,
            "requests": num_requests,
            "prompt_tokens": num_tokens,
            "output_tokens": num_tokens,
            "tokens_per_second": round(num_requests * num_tokens / medians[name], 1),
            "spread": round(max(values) / min(values), 2),
            "jllm_is_faster_by": round(medians[name] / medians["jllm"], 2),
        }
        for name, values in times.items()
    ]


def main() -> None:
    """Runs the benchmark, prints its rows and appends them to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder; none is the embedded model")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    with LLM(options.model, dtype="float32") as llm:
        llm.wait_until_compiled()
        runs = {"jllm": engine_run(llm)}
        peer = transformers_run(str(llm.model_path))
        if peer is None:
            print("transformers: left out, torch is not installed")
        else:
            runs["transformers"] = peer
        rows: list[dict[str, Any]] = []
        for count in options.requests:
            rows += measure(runs, count, options.tokens, llm.vocab_size)
        for row in rows:
            row["model"] = llm.model_path.name
            print(row)
    record.append("offline", rows)


if __name__ == "__main__":
    main()
