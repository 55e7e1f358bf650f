"""What share of the speed of its bare products the engine reaches on a CPU.

    python -m benchmarks.cpu_products [--shapes llama-120m] [--rows 1 8 32] [--prefill]

The bare products are one program with every matrix product of the network, one after
the other, on the engine's own weights and nothing else: no norm, attention, cache or
sampling, and no host. Products and engine take turns, so that a slow spell of the
machine meets both; the share is the median over the turns. Weights are random.
"""

import argparse
import functools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from jllm.config import EngineConfig
from jllm.engine.create import create_engine
from jllm.engine.engine import Engine
from jllm.layers.linear import linear_float32
from jllm.types import EngineRequest, SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "llama-120m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
}
PROMPT = 128
"""Tokens before the decode steps that are timed."""

PREFILL = 512


def make_engine(shape: str, dtype: str, rows: int) -> Engine:
    """An engine of a shape with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        engine = create_engine(
            EngineConfig(
                model=folder,
                load_format="random",
                skip_tokenizer_init=True,
                dtype=dtype,  # pyright: ignore[reportArgumentType]
                max_model_len=2048,
                max_num_seqs=rows,
                max_num_batched_tokens=PREFILL,
                num_blocks=rows * 128,
                enable_prefix_caching=False,
                compile_ahead=False,
            )
        )
    assert isinstance(engine, Engine)
    return engine


def all_products(weights: Any, x: jax.Array, head_rows: int) -> jax.Array:
    """Every product of the network, each waiting for the one before."""

    def after(width: int, result: jax.Array) -> jax.Array:
        column = (1e-30 * result.reshape(result.shape[0], -1)[:, :1]).astype(x.dtype)
        return jnp.broadcast_to(column, (result.shape[0], width)) + jnp.ones(
            (), x.dtype
        )

    result = x
    for layer in weights["layers"]:
        for name in ("qkv", "out", "gate_up", "down"):
            weight = layer[name]
            result = linear_float32(after(weight.shape[-1], result), weight)
    head = weights["head"] if "head" in weights else weights["embed"]
    return linear_float32(after(head.shape[-1], result)[:head_rows], head)


def compile_products(
    engine: Engine, rows: int, head_rows: int
) -> Callable[[], jax.Array]:
    """The bare products of a step as one program, on the engine's weights."""
    weights = engine.weights  # pyright: ignore[reportPrivateUsage]
    x = jnp.ones((rows, weights["embed"].shape[1]), weights["embed"].dtype)
    products = functools.partial(all_products, head_rows=head_rows)
    compiled = jax.jit(products).lower(weights, x).compile()
    return lambda: compiled(weights, x).block_until_ready()


def add_requests(
    engine: Engine, tag: str, count: int, prompt: int, tokens: int
) -> None:
    """Queues requests of random tokens, greedy, of fixed length."""
    rng = np.random.default_rng(len(tag))
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for index in range(count):
        ids = rng.integers(3, 30000, prompt).tolist()
        engine.add(EngineRequest(f"{tag}-{index}", ids, params))


def seconds_of(call: Callable[[], object], times: int) -> float:
    """Seconds of one of several calls."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def measure_decode(engine: Engine, rows: int, turns: int) -> dict[str, Any]:
    """Time of a decode step of so many rows, and of its products."""
    products = compile_products(engine, rows, rows)
    engine.programs.get("decode", rows)
    steps = 4
    add_requests(engine, f"decode{rows}", rows, PROMPT, turns * steps * 2 + 32)
    while engine.scheduler.num_waiting or engine.scheduler.num_running < rows:
        engine.step()
    for _ in range(4):
        engine.step()
    products()
    pairs: list[tuple[float, float]] = []
    for _ in range(turns):
        engine.step()  # Fills the pipeline again.
        step = seconds_of(engine.step, steps)
        jax.block_until_ready(engine.state)
        pairs.append((seconds_of(products, steps), step))
    while engine.has_unfinished:
        engine.step()
    return figures(pairs, rows) | {"kind": "decode", "rows": rows}


def measure_prefill(engine: Engine, turns: int) -> dict[str, Any]:
    """Time to the first token of a prompt as long as a step, and of its products."""
    products = compile_products(engine, PREFILL, 1)

    def one_prompt() -> None:
        add_requests(engine, "prefill", 1, PREFILL, 1)
        while engine.has_unfinished:
            engine.step()

    one_prompt()
    products()
    pairs = [(seconds_of(products, 1), seconds_of(one_prompt, 1)) for _ in range(turns)]
    return figures(pairs, PREFILL) | {"kind": "prefill", "rows": PREFILL}


def figures(pairs: list[tuple[float, float]], tokens: int) -> dict[str, Any]:
    """Medians of the turns' (products, engine) seconds."""
    products, engine = (statistics.median(side) for side in zip(*pairs, strict=True))
    shares = [one / other for one, other in pairs]
    # What the machine can do when nothing disturbs either side.
    least = [min(side) for side in zip(*pairs, strict=True)]
    return {
        "products_ms": round(products * 1e3, 2),
        "engine_ms": round(engine * 1e3, 2),
        "engine_tokens_per_second": round(tokens / engine, 1),
        "share_percent": round(100 * statistics.median(shares), 1),
        "share_of_least_percent": round(100 * least[0] / least[1], 1),
        "spread": round(max(shares) / min(shares), 2),
        "turns": len(pairs),
    }


def main() -> None:
    """Runs the benchmark, prints its rows and appends them to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--prefill", action="store_true", help="prefill as well")
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        engine = make_engine(shape, options.dtype, max(options.rows))
        found = [measure_decode(engine, n, options.turns) for n in options.rows]
        if options.prefill:
            found.append(measure_prefill(engine, options.turns))
        for row in found:
            rows.append({"model": shape, "dtype": options.dtype, **row})
            print(rows[-1])
        engine.close()
    if not options.dry_run:
        record.append("cpu_products", rows)


if __name__ == "__main__":
    main()
