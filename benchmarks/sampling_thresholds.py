"""Times how top-k and top-p find the lowest score that they keep.

    python -m benchmarks.sampling_thresholds [--repeats 9]

Bisection over the whole vocabulary, which a sharded one needs, beside the search that
the sampler takes on a CPU; both in one process, in turns; medians are compared.
"""

import argparse
import json
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks import record
from pallas_kernels.common.target import Target
from pallas_kernels.top_p_threshold import top_p_threshold

NUM_ROWS = (1, 8, 32)
VOCAB_SIZE = 151_936
RULES = {
    "top_p 0.9": (0, 0.9),
    "top_k 50, top_p 0.9": (50, 0.9),
    "neutral": (0, 1.0),
}
METHODS = {"bisection": "reference", "blocked": "blocked"}


def measure(num_rows, top_k, top_p, repeats):
    """Milliseconds of each method, in the order of the runs, and their results."""
    scores = jax.random.normal(jax.random.key(0), (num_rows, VOCAB_SIZE)) * 3
    arguments = (
        scores,
        jnp.full(num_rows, top_k, jnp.int32),
        jnp.full(num_rows, top_p, jnp.float32),
        jnp.full(num_rows, 0.8, jnp.float32),
    )
    programs = {
        name: jax.jit(
            partial(
                top_p_threshold, implementation=implementation, target=Target("cpu")
            )
        )
        for name, implementation in METHODS.items()
    }
    found = [program(*arguments).tolist() for program in programs.values()]
    times = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            program(*arguments).block_until_ready()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times, found[0] == found[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    lines = []
    for rules, (top_k, top_p) in RULES.items():
        for num_rows in NUM_ROWS:
            times, is_same = measure(num_rows, top_k, top_p, arguments.repeats)
            medians = {name: statistics.median(times[name]) for name in times}
            case = {
                "rules": rules,
                "rows": num_rows,
                "vocab_size": VOCAB_SIZE,
                **{f"{name}_ms": round(value, 3) for name, value in medians.items()},
                "blocked_is_faster_by": round(
                    medians["bisection"] / medians["blocked"], 2
                ),
                "same_thresholds": is_same,
                "repeats": arguments.repeats,
            }
            print(json.dumps(case), flush=True)
            lines.append(case)
    record.append("sampling_thresholds", lines)


if __name__ == "__main__":
    main()
