"""How fast the ways of multiplying a single bfloat16 row are on a CPU, by shape.

    python -m benchmarks.cpu_one_row [--shapes llama-120m qwen3-0.6b] [--turns 15]

The ways take turns on the same weights; of each the median over the turns counts. A
turn goes through copies of the weight that no cache holds, as a step does. The way that
`jllm.layers.linear` takes by rule is compared with the fastest.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.cpu_products import SHAPES
from jllm.layers import linear

TILE_SIZES = (1 << 19, 1 << 20, 1 << 21, 1 << 22)
"""Weights per tile; the rule takes the second."""

CACHE_BYTES = 128 << 20
"""Copies of a weight are as large together."""

Product = Callable[[jax.Array, jax.Array], jax.Array]


def matrix_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every product of a network, by name."""
    width, mlp, head_dim = (
        config[key] for key in ("hidden_size", "intermediate_size", "head_dim")
    )
    heads = config["num_attention_heads"]
    return {
        "qkv": ((heads + 2 * config["num_key_value_heads"]) * head_dim, width),
        "out": (width, heads * head_dim),
        "gate_up": (2 * mlp, width),
        "down": (width, mlp),
        "head": (config["vocab_size"], width),
    }


def two_rows(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The row twice, in one product."""
    both = jnp.concatenate([x, x])
    return linear._product(both, weight)[:1]  # pyright: ignore[reportPrivateUsage]


def by_tiles(tile: int) -> Product:
    """Widened tile by tile."""

    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        num_tiles = max(2, round(weight.size / tile))
        by = linear._product_by_tiles  # pyright: ignore[reportPrivateUsage]
        return by(x, weight, num_tiles)

    return product


def candidates() -> dict[str, Product]:
    """All ways, the one by rule first."""
    tiles = {f"tiles of {size}": by_tiles(size) for size in TILE_SIZES}
    return {"rule": linear.linear_float32, "two rows": two_rows, **tiles}


def measure(shape: tuple[int, int], turns: int) -> dict[str, Any]:
    """Microseconds of each way for one shape, and what the rule loses."""
    rng = np.random.default_rng(0)
    copies = max(1, CACHE_BYTES // (2 * shape[0] * shape[1]))
    weights = [
        jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)
        for _ in range(min(copies, 16))
    ]
    x = jnp.ones((1, shape[1]), jnp.bfloat16)
    programs = {
        name: jax.jit(product).lower(x, weights[0]).compile()
        for name, product in candidates().items()
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(turns + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            for weight in weights:
                program(x, weight).block_until_ready()
            times[name].append((time.perf_counter() - start) / len(weights))
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    best = min(medians, key=medians.__getitem__)
    return {
        "outputs": shape[0],
        "inputs": shape[1],
        "microseconds": {name: round(1e6 * t, 1) for name, t in medians.items()},
        "least_microseconds": {
            name: round(1e6 * min(found[1:]), 1) for name, found in times.items()
        },
        "best": best,
        "rule_to_best": round(medians["rule"] / medians[best], 2),
        "turns": turns,
    }


def main() -> None:
    """Runs the benchmark, prints its rows and appends them to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in options.shapes:
        for name, shape in matrix_shapes(SHAPES[model]).items():
            found = measure(shape, options.turns)
            rows.append({"model": model, "product": name, **found})
            print(rows[-1])
    if not options.dry_run:
        record.append("cpu_one_row", rows)


if __name__ == "__main__":
    main()
