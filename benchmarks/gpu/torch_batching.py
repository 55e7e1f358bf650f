"""transformers' continuous batching on the device at hand, and jllm beside it.

    python -m benchmarks.gpu.torch_batching MODEL [--requests N] [--mean 562] [--trial]

Requests of random lengths (from 0.18 to 1.82 times the mean, prompt and output), all at
once, greedy, end tokens ignored. Both engines make random weights of the same shape in
bfloat16 and get the same requests; transformers first, and its memory is freed before
jllm starts. The second of two passes is timed.
"""

import argparse
import gc
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.gpu import models

Requests = list[tuple[list[int], int]]


def make_requests(model: str, count: int, mean: int, turn: int) -> Requests:
    """Prompts and output lengths; new ones in every turn."""
    rng = np.random.default_rng(turn)
    low, high = int(0.18 * mean), int(1.82 * mean)
    vocab = models.SHAPES[model]["vocab_size"]
    sizes = rng.integers(max(1, low), high + 1, (count, 2)).tolist()
    return [(rng.integers(3, vocab, a).tolist(), b) for a, b in sizes]


def transformers_seconds(folder: pathlib.Path, turns: list[Requests]) -> float:
    """Seconds of the last turn in transformers."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        ContinuousBatchingConfig,
        GenerationConfig,
    )

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
    longest = max(len(p) + n for turn in turns for p, n in turn)
    blocks = (-(-longest // 16) + 1) * min(256, len(turns[0]))
    manager: Any = model.eval().init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=longest),
        ContinuousBatchingConfig(
            num_blocks=blocks, block_size=16, max_batch_tokens=512
        ),
    )
    manager.start()
    seconds = 0.0
    for turn in turns:
        began = time.perf_counter()
        for prompt, length in turn:
            manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
        made = 0
        while made < len(turn):
            result = manager.get_result(timeout=120)
            if result is None:
                raise TimeoutError("transformers gave no result for 120 s")
            made += result.is_finished()
        seconds = time.perf_counter() - began
    manager.stop(block=True)
    del manager, model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return seconds


def jllm_seconds(folder: pathlib.Path, turns: list[Requests]) -> float:
    """Seconds of the last turn in jllm."""
    from jllm import LLM, SamplingParams

    longest = max(len(p) + n for turn in turns for p, n in turn)
    seconds = 0.0
    with LLM(
        str(folder),
        load_format="random",
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=min(256, len(turns[0])),
    ) as llm:
        llm.wait_until_compiled()
        for turn in turns:
            params = [
                SamplingParams(
                    temperature=0, max_tokens=n, ignore_eos=True, detokenize=False
                )
                for _, n in turn
            ]
            began = time.perf_counter()
            llm.generate([p for p, _ in turn], params, use_tqdm=False)
            seconds = time.perf_counter() - began
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints and records both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=models.SHAPES)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--mean", type=int, default=562)
    parser.add_argument("--trial", action="store_true", help="record nothing")
    options = parser.parse_args(arguments)
    # JAX would take three quarters of the GPU's memory from the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    turns = [
        make_requests(options.model, options.requests, options.mean, turn)
        for turn in range(2)
    ]
    tokens = sum(n for _, n in turns[-1])
    with tempfile.TemporaryDirectory() as parent:
        folder = models.config_folder(options.model, pathlib.Path(parent))
        seconds = {"transformers": transformers_seconds(folder, turns)}
        seconds["jllm"] = jllm_seconds(folder, turns)
    rows = [
        {
            "model": options.model,
            "engine": engine,
            "requests": options.requests,
            "output_tokens": tokens,
            "tokens_per_second": round(tokens / taken, 1),
            "times_transformers": round(seconds["transformers"] / taken, 2),
        }
        for engine, taken in seconds.items()
    ]
    for row in rows:
        print(json.dumps(row), flush=True)
    if not options.trial:
        record.append("gpu_batching", rows)


if __name__ == "__main__":
    main()
