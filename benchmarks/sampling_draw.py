"""Times the two ways to draw a token, one line of JSON per case.

    python -m benchmarks.sampling_draw [--repeats 21]

Each case is one jitted `draw`, timed to the end of its computation. The methods take
turns, so that a slow spell of the machine meets both; medians are compared.
"""

import argparse
import json
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks import record
from jllm.sampling.draws import DRAWS
from jllm.sampling.rows import SamplingRows
from jllm.sampling.sampler import draw

NUM_ROWS = (1, 32)
VOCAB_SIZES = (32_000, 151_936)


def make_rows(num_rows):
    """Rows that sample at temperature 1 from different random streams."""

    def full(value, dtype=jnp.float32):
        return jnp.full(num_rows, value, dtype)

    zeros = full(0, jnp.int32)
    return SamplingRows(
        temperature=full(1),
        top_p=full(1),
        min_p=full(0),
        presence=full(0),
        frequency=full(0),
        repetition=full(1),
        top_k=zeros,
        seed=jnp.ones((num_rows, 2), jnp.uint32),
        position=jnp.arange(num_rows, dtype=jnp.int32),
        prompt_len=zeros,
        min_tokens=zeros,
    )


def measure(num_rows, vocab_size, repeats):
    """Milliseconds of each method, in the order of the runs."""
    logits = jax.random.normal(jax.random.key(0), (num_rows, vocab_size)) * 3
    rows = make_rows(num_rows)
    programs = {name: jax.jit(partial(draw, method=name)) for name in DRAWS}
    times = {name: [] for name in programs}
    for program in programs.values():
        program(logits, rows).block_until_ready()
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            program(logits, rows).block_until_ready()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    lines = []
    for vocab_size in VOCAB_SIZES:
        for num_rows in NUM_ROWS:
            times = measure(num_rows, vocab_size, arguments.repeats)
            for method, values in times.items():
                case = {
                    "method": method,
                    "rows": num_rows,
                    "vocab_size": vocab_size,
                    "median_ms": round(statistics.median(values), 3),
                    "min_ms": round(min(values), 3),
                    "max_ms": round(max(values), 3),
                    "repeats": len(values),
                }
                print(json.dumps(case))
                lines.append(case)
    record.append("sampling_draw", lines)


if __name__ == "__main__":
    main()
