"""Device time of a call, without the host's share."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

CALLS = (8, 24)
REPEATS = 7
CACHE_BYTES = 128 << 20
"""More than any cache of a device holds; inputs are rotated over as many bytes."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of some measurements, and their spread."""

    median: float
    low: float
    high: float


def seconds_per_call(
    function: Callable[..., Any],
    arguments: Sequence[jax.Array],
    donated: Sequence[int] = (),
) -> Timing:
    """Times a call inside one program of several calls that depend on each other.

    The difference between a program of 24 calls and one of 8 is 16 calls and nothing
    else: no dispatch, no upload. The inputs are copies in turn, so that no call finds
    its bytes in the device's cache; what is updated in place goes from call to call.
    """
    num_bytes = sum(a.nbytes for a in arguments)
    num_copies = max(1, min(8, -(-CACHE_BYTES // max(num_bytes, 1))))
    copies = [
        [a if place in donated else jnp.array(a) for place, a in enumerate(arguments)]
        for _ in range(num_copies)
    ]

    def program(num_calls: int) -> Callable[[Any], Any]:
        def run(copies: Any) -> Any:
            state = [copies[0][i] for i in donated]
            outs: list[Any] = []
            for call in range(num_calls):
                own = list(copies[call % num_copies])
                if outs:
                    # No call may start before the last one ended, nor be shared with
                    # it; all results are returned, so that none is left out.
                    own, outs[-1] = jax.lax.optimization_barrier((own, outs[-1]))
                for place, array in zip(donated, state, strict=True):
                    own[place] = array
                out = function(*own)
                state = _updated(out, state)
                outs.append(out)
            return (state, outs[-1]) if donated else outs

        return jax.jit(run).lower(copies).compile()

    few, many = (program(n) for n in CALLS)
    for run in (few, many):
        jax.block_until_ready(run(copies))
    found = []
    for _ in range(REPEATS):
        spent = [_seconds(run, copies) for run in (few, many)]
        found.append((spent[1] - spent[0]) / (CALLS[1] - CALLS[0]))
    return Timing(statistics.median(found), min(found), max(found))


def _updated(out: Any, state: list[jax.Array]) -> list[jax.Array]:
    """The results that stand for the donated arguments: the first of equal shape."""
    leaves = jax.tree.leaves(out)
    return [
        next(x for x in leaves if (x.shape, x.dtype) == (old.shape, old.dtype))
        for old in state
    ]


def _seconds(run: Callable[[Any], Any], copies: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(copies))
    return time.perf_counter() - start
