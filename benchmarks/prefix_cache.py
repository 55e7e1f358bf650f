"""What the prefix cache costs where nothing is shared, and brings where much is.

    python -m benchmarks.prefix_cache [--model FOLDER] [--shared 0 90] [--turns 5]

Two engines in one process, one with the cache and one without, take turns on the same
prompts: so many per cent of each prompt's tokens are the same in all requests of a
turn, and new in the next turn. Ratios are medians over the turns.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np

from benchmarks import record
from jllm import LLM, SamplingParams

GOALS = {0: 0.99, 90: 2.5}
"""Least ratio of the throughput with the cache to that without, by shared per cent."""


def make_prompts(
    rng: np.random.Generator, options: argparse.Namespace, shared: int, vocab_size: int
) -> list[list[int]]:
    """Random prompts that begin with the same tokens."""
    common = rng.integers(3, vocab_size, options.prompt * shared // 100).tolist()
    own = options.prompt - len(common)
    return [
        common + rng.integers(3, vocab_size, own).tolist()
        for _ in range(options.requests)
    ]


def tokens_per_second(llm: LLM, prompts: list[list[int]], num_tokens: int) -> float:
    """Prompt and output tokens of a turn, by its seconds."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert all(len(out.outputs[0].token_ids) == num_tokens for out in outputs)
    return sum(len(prompt) + num_tokens for prompt in prompts) / seconds


def measure(llms: dict[str, LLM], shared: int, options: argparse.Namespace) -> Any:
    """Lets both engines take turns, after one that is not timed."""
    rng = np.random.default_rng(shared)
    rates: dict[str, list[float]] = {name: [] for name in llms}
    for turn in range(options.turns + 1):
        prompts = make_prompts(rng, options, shared, llms["on"].vocab_size)
        names = list(llms) if turn % 2 else list(llms)[::-1]
        for name in names:
            rate = tokens_per_second(llms[name], prompts, options.tokens)
            if turn:
                rates[name].append(rate)
    ratios = [on / off for on, off in zip(rates["on"], rates["off"], strict=True)]
    return {
        "shared_percent": shared,
        "requests": options.requests,
        "prompt_tokens": options.prompt,
        "output_tokens": options.tokens,
        **{
            f"{name}_tokens_per_second": round(statistics.median(values), 1)
            for name, values in rates.items()
        },
        "ratio": round(statistics.median(ratios), 3),
        "goal": GOALS.get(shared),
        "spread": round(max(ratios) / min(ratios), 2),
        "turns": options.turns,
    }


def main() -> None:
    """Runs the benchmark, prints its rows and appends them to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder; none is the embedded model")
    parser.add_argument("--shared", type=int, nargs="+", default=[0, 90])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=320)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    options = parser.parse_args()
    llms = {
        name: LLM(options.model, enable_prefix_caching=name == "on")
        for name in ("on", "off")
    }
    rows: list[dict[str, Any]] = []
    for llm in llms.values():
        llm.wait_until_compiled()
    for shared in options.shared:
        name = llms["on"].model_path.name
        rows.append({"model": name, **measure(llms, shared, options)})
        print(rows[-1])
    for llm in llms.values():
        llm.close()
    if not options.dry_run:
        record.append("prefix_cache", rows)


if __name__ == "__main__":
    main()
