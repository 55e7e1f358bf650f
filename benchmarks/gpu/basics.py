"""What device and runtime can do at most: bandwidth, products, launches, copies.

    python -m benchmarks.gpu.basics [--label TEXT] [--trial]

`chain` is a program of 256 dependent small kernels: with and without command buffers
(XLA's flags, in processes of their own) it shows what they save per launch.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.kernels.limits import copy_bandwidth, matrix_rate

CHAIN = 256


def microseconds(call: Callable[[], Any], repeat: int = 200) -> float:
    """Median time of a call until its result is there."""
    times: list[float] = []
    for _ in range(repeat):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return round(1e6 * statistics.median(times[repeat // 10 :]), 2)


def chain(x: jax.Array) -> jax.Array:
    """Small products that XLA cannot fuse into one kernel."""
    for _ in range(CHAIN):
        x = jnp.tanh(x @ x)
    return x


def run(*, is_trial: bool) -> list[dict[str, Any]]:
    """All figures."""
    small = jnp.ones((64, 64), jnp.float32)
    vector = np.zeros(1024, np.int32)
    compiled = jax.jit(chain).lower(small).compile()
    empty = jax.jit(lambda x: x + 1).lower(small).compile()
    host = [jax.jit(lambda x, i=i: x + i)(jnp.zeros(64, jnp.int32)) for i in range(201)]
    sources = iter(host)
    size = 1 << (22 if is_trial else 32)
    chain_us = microseconds(lambda: compiled(small))
    return [
        {"figure": "copy bandwidth, GB/s", "value": copy_bandwidth(size) / 1e9},
        {
            "figure": "bfloat16 product, TFLOP/s",
            "value": matrix_rate(256 if is_trial else 8192) / 1e12,
        },
        {"figure": "one launch, us", "value": microseconds(lambda: empty(small))},
        {"figure": f"chain of {CHAIN}, us", "value": chain_us},
        {"figure": "per kernel of the chain, us", "value": chain_us / CHAIN},
        {
            "figure": "upload of 4 kB, us",
            "value": microseconds(lambda: jax.device_put(vector)),
        },
        {
            "figure": "read back of 256 B, us",
            "value": microseconds(lambda: np.asarray(next(sources))),
        },
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints and records the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--label", default="")
    parser.add_argument("--trial", action="store_true", help="tiny; record nothing")
    options = parser.parse_args(arguments)
    facts = {"setting": options.label, "device": jax.devices()[0].device_kind}
    rows = [facts | row for row in run(is_trial=options.trial)]
    for row in rows:
        print(json.dumps(row), flush=True)
    if not options.trial:
        record.append("gpu_basics", rows)


if __name__ == "__main__":
    main()
