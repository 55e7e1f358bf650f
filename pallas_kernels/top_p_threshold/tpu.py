"""Mosaic TPU: some whole rows at a time in VMEM, so that HBM is read once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from pallas_kernels.common.cost import cost_of
from pallas_kernels.common.elementwise import struct
from pallas_kernels.common.target import Target
from pallas_kernels.top_p_threshold.search import Measured, largest_threshold

LANES = 128
ROWS = 8
COLUMNS = 512
MAX_WIDTH = 1 << 19
VMEM_BYTES = 56 << 20

NUM_PASSES, FLOPS_PER_SCORE = 12, 8
"""Of both searches together as a rule, for the compiler's estimate."""


def top_p_threshold_tpu(
    scores: Float[Array, "S V"],
    top_k: Int[Array, " S"],
    top_p: Float[Array, " S"],
    temperature: Float[Array, " S"],
    *,
    target: Target,
) -> Float[Array, " S"]:
    """Finds the thresholds; see `api.top_p_threshold`."""
    num_rows, width = scores.shape
    if width % LANES or width > MAX_WIDTH:
        raise NotImplementedError(
            f"width {width} is no multiple of {LANES} lanes up to {MAX_WIDTH}"
        )
    if not scores.size:
        return jnp.full(num_rows, -jnp.inf, jnp.float32)
    rows = min(ROWS, num_rows)
    narrow = pl.BlockSpec((rows, 1), lambda i: (i, 0))
    parameters = (top_k.astype(jnp.float32), top_p, temperature)
    out = pl.pallas_call(
        _kernel,
        grid=(pl.cdiv(num_rows, rows),),
        out_shape=struct((num_rows, 1), "float32"),
        in_specs=[pl.BlockSpec((rows, width), lambda i: (i, 0)), *[narrow] * 3],
        out_specs=narrow,
        scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=cost_of(
            scores,
            flops=NUM_PASSES * FLOPS_PER_SCORE * scores.size,
            exponentials=scores.size,
        ),
        interpret=target.interpret,
        name="top_p_threshold",
    )(scores, *(parameter[:, None] for parameter in parameters))
    return out[:, 0]


def _kernel(
    scores_ref: Any,
    top_k_ref: Any,
    top_p_ref: Any,
    temperature_ref: Any,
    out_ref: Any,
    weights_ref: Any,
) -> None:
    rows, width = scores_ref.shape
    columns = min(COLUMNS, width)

    def over(add: Any, start: tuple[float, ...]) -> tuple[Any, ...]:
        """Passes over the rows, given how a run of columns adds to the results."""

        def step(i: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            run = pl.ds(pl.multiple_of(i * columns, columns), columns)
            return add(run, carry)

        carry = tuple(jnp.full((rows, columns), s, jnp.float32) for s in start)
        carry = jax.lax.fori_loop(0, width // columns, step, carry)
        rest = width % columns
        if not rest:
            return carry
        ends = tuple(jnp.full((rows, rest), s, jnp.float32) for s in start)
        ends = add(pl.ds(width - rest, rest), ends)
        return (*carry, *ends)

    def reduced(results: tuple[Any, ...], *reductions: Any) -> list[Any]:
        parts: list[Any] = []
        count = len(reductions)
        for i, (reduction, both) in enumerate(reductions):
            total = reduction(results[i], axis=1, keepdims=True)
            if len(results) > count:
                end = reduction(results[count + i], axis=1, keepdims=True)
                total = both(total, end)
            parts.append(total)
        return parts

    def add_range(run: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        best, least, count = carry
        x = scores_ref[:, run]
        is_there = x > -jnp.inf
        return (
            jnp.maximum(best, x),
            jnp.minimum(least, jnp.where(is_there, x, jnp.inf)),
            count + jnp.where(is_there, 1.0, 0.0),
        )

    ranges = over(add_range, (-jnp.inf, jnp.inf, 0.0))
    best, least, count = reduced(ranges, _MAX, _MIN, _SUM)
    is_finite = (best < jnp.inf) & (best > -jnp.inf)

    def measure(amounts: Any, pivots: tuple[Any, ...], low: Any, high: Any) -> Measured:
        def add(run: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            least, greatest, *sums = carry
            x = scores_ref[:, run]
            amount = 1.0 if amounts is None else amounts[:, run]
            inside = (x >= low) & (x <= high)
            return (
                jnp.minimum(least, jnp.where(inside, x, jnp.inf)),
                jnp.maximum(greatest, jnp.where(inside, x, -jnp.inf)),
                *(
                    total + jnp.where(x >= pivot, amount, 0.0)
                    for total, pivot in zip(sums, pivots, strict=True)
                ),
            )

        results = over(add, (jnp.inf, -jnp.inf, *(0.0 for _ in pivots)))
        least, greatest, *sums = reduced(results, _MIN, _MAX, *(_SUM for _ in pivots))
        return Measured(tuple(sums), least, greatest)

    wanted = top_k_ref[...]
    cuts = is_finite & (wanted > 0) & (wanted < width) & (wanted <= count)
    start = jnp.where(cuts, least, best)
    kth = largest_threshold(start, best, partial(measure, None), wanted, _is_any)
    lowest = jnp.where(cuts, kth, -jnp.inf)
    divisor = temperature_ref[...]

    def add_weights(run: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        x = scores_ref[:, run]
        weights = jnp.where(x >= lowest, jnp.exp((x - best) / divisor), 0.0)
        weights_ref[:, run] = weights
        return (carry[0] + weights,)

    (total,) = reduced(over(add_weights, (0.0,)), _SUM)
    bound = top_p_ref[...] * total
    cuts = is_finite & (top_p_ref[...] < 1.0)
    start = jnp.where(cuts, jnp.maximum(lowest, least), best)
    found = largest_threshold(
        start, best, partial(measure, weights_ref), bound, _is_any
    )
    out_ref[...] = jnp.where(cuts, found, lowest)


_MAX = (jnp.max, jnp.maximum)
_MIN = (jnp.min, jnp.minimum)
_SUM = (jnp.sum, jnp.add)


def _is_any(flags: Any) -> Any:
    return jnp.max(jnp.where(flags, 1.0, 0.0)) > 0
