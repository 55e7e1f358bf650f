"""Pallas on Triton: one program per row, which passes over it a few times.

A row of a large vocabulary does not fit into the memory of a multiprocessor, but the
rows of a step fit into the cache of the device.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int

from pallas_kernels.common.elementwise import struct
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes
from pallas_kernels.top_p_threshold.search import Measured, largest_threshold

SIZES = {"columns": 2048, "unroll": 4, "warps": 16}


def top_p_threshold_gpu_triton(
    scores: Float[Array, "S V"],
    top_k: Int[Array, " S"],
    top_p: Float[Array, " S"],
    temperature: Float[Array, " S"],
    *,
    target: Target,
) -> Float[Array, " S"]:
    """Finds the thresholds; see `api.top_p_threshold`."""
    num_rows = scores.shape[0]
    if not scores.size:
        return jnp.full(num_rows, -jnp.inf, jnp.float32)
    sizes = tuned_sizes("top_p_threshold", target, "rows", SIZES)
    return pl.pallas_call(
        partial(_kernel, columns=sizes["columns"], unroll=sizes["unroll"]),
        grid=(num_rows,),
        out_shape=struct((num_rows,), "float32"),
        in_specs=[pl.no_block_spec] * 4,
        out_specs=pl.no_block_spec,
        compiler_params=pltriton.CompilerParams(num_warps=sizes["warps"], num_stages=1),
        interpret=target.interpret,
        name="top_p_threshold",
    )(scores, top_k.astype(jnp.int32), top_p, temperature)


def _kernel(
    scores_ref: Any,
    top_k_ref: Any,
    top_p_ref: Any,
    temperature_ref: Any,
    out_ref: Any,
    *,
    columns: int,
    unroll: int,
) -> None:
    row = pl.program_id(0)
    width = scores_ref.shape[1]
    top_k, top_p = top_k_ref[row], top_p_ref[row]
    faster = 1.0 / temperature_ref[row]

    def over(add: Any, start: tuple[float, ...]) -> tuple[Any, ...]:
        """Passes over the row, given how a run of scores adds to the results."""

        def step(i: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            first = i * (columns * unroll)
            offsets = [
                first + j * columns + jnp.arange(columns, dtype=jnp.int32)
                for j in range(unroll)
            ]
            runs = [
                pltriton.load(scores_ref.at[row, o], mask=o < width, other=-jnp.inf)
                for o in offsets
            ]
            for run in runs:
                carry = add(run, carry)
            return carry

        carry = tuple(jnp.full(columns, s, jnp.float32) for s in start)
        return jax.lax.fori_loop(0, pl.cdiv(width, columns * unroll), step, carry)

    def add_range(x: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        best, least, count = carry
        is_there = x > -jnp.inf
        return (
            jnp.maximum(best, x),
            jnp.minimum(least, jnp.where(is_there, x, jnp.inf)),
            count + jnp.where(is_there, 1.0, 0.0),
        )

    ranges = over(add_range, (-jnp.inf, jnp.inf, 0.0))
    best, least, count = jnp.max(ranges[0]), jnp.min(ranges[1]), jnp.sum(ranges[2])
    is_finite = (best < jnp.inf) & (best > -jnp.inf)

    def measure(of: Any, pivots: tuple[Any, ...], low: Any, high: Any) -> Measured:
        def add(x: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            least, greatest, *sums = carry
            amount = of(x)
            inside = (x >= low) & (x <= high)
            return (
                jnp.minimum(least, jnp.where(inside, x, jnp.inf)),
                jnp.maximum(greatest, jnp.where(inside, x, -jnp.inf)),
                *(
                    total + jnp.where(x >= pivot, amount, 0.0)
                    for total, pivot in zip(sums, pivots, strict=True)
                ),
            )

        start = (jnp.inf, -jnp.inf, *(0.0 for _ in pivots))
        least, greatest, *sums = over(add, start)
        return Measured(
            tuple(jnp.sum(total) for total in sums), jnp.min(least), jnp.max(greatest)
        )

    # Counts are exact in float32 up to 2^24 scores.
    wanted = top_k.astype(jnp.float32)
    cuts = is_finite & (top_k > 0) & (top_k < width) & (wanted <= count)
    start = jnp.where(cuts, least, best)
    kth = largest_threshold(
        start, best, partial(measure, jnp.ones_like), wanted, _itself
    )
    lowest = jnp.where(cuts, kth, -jnp.inf)

    def weights(x: Any) -> Any:
        return jnp.exp((x - best) * faster)

    def add_weights(x: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        return (carry[0] + jnp.where(x >= lowest, weights(x), 0.0),)

    (total,) = over(add_weights, (0.0,))
    bound = top_p * jnp.sum(total)
    cuts = is_finite & (top_p < 1.0)
    start = jnp.where(cuts, jnp.maximum(lowest, least), best)
    found = largest_threshold(start, best, partial(measure, weights), bound, _itself)
    out_ref[row] = jnp.where(cuts, found, lowest)


def _itself(flag: Any) -> Any:
    return flag
