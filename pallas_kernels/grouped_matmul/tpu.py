"""Pallas on TPU: each run of rows is visited once for every group with a part in it.

Tiles of rows are aligned, as copies into VMEM have to be. A tile of the result stays in
VMEM from its first visit to its last; each visit writes its own rows.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.cost import cost_of
from pallas_kernels.common.matmul_tpu import (
    LANES,
    contraction_types,
    convert,
    covering_tile,
    fitting_tile,
    min_rows,
    multiply,
)
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes
from pallas_kernels.grouped_matmul.tiles import TileTable, tile_table

DEFAULT_SIZES = {"tile_m": 128, "tile_n": 512, "tile_k": 2048}


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """Static facts of one call: sizes T, N and K, and those of tiles."""

    rows: int
    channels: int
    inputs: int
    tile_m: int
    tile_n: int
    tile_k: int

    @property
    def steps(self) -> int:
        """Steps over all inputs."""
        return self.inputs // self.tile_k


def grouped_matmul_tpu(
    x: Float[Array, "T K"],
    weights: Shaped[Array, "X N K"],
    group_sizes: Int[Array, " X"],
    scales: Float[Array, "X N"] | None,
    out_dtype: DTypeLike,
    *,
    target: Target,
) -> Float[Array, "T N"]:
    """As the reference; float16 is not known to TPUs."""
    if 0 in (*x.shape, *weights.shape):
        raise NotImplementedError("empty arrays")
    contraction_types(x.dtype, weights.dtype, target.generation)
    plan = _make_plan(x, weights, target)
    num_rows = x.shape[0]
    table = tile_table(group_sizes, plan.rows, plan.tile_m, aligned=True)
    # Rows of no group read the matrix that is there already.
    last_group = jnp.max(
        jnp.where(group_sizes > 0, jnp.arange(len(group_sizes), dtype=jnp.int32), 0)
    )
    has_group = table.groups < weights.shape[0]
    computes = has_group & (table.starts < table.ends)
    table = table._replace(groups=jnp.where(has_group, table.groups, last_group))
    specs = _specs(plan)
    arrays = {"x": jnp.pad(x, ((0, plan.rows - num_rows), (0, 0))), "weights": weights}
    if scales is not None:
        arrays["scales"] = scales[:, None, :]
    out_shape = jax.ShapeDtypeStruct((plan.rows, plan.channels), out_dtype)
    num_matrices = min(len(weights), num_rows)
    out = pl.pallas_call(
        partial(_kernel, has_scales=scales is not None, plan=plan),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(
                pl.cdiv(plan.channels, plan.tile_n),
                table.groups.shape[0],
                plan.steps,
            ),
            in_specs=[specs[name] for name in arrays],
            out_specs=specs["out"],
            scratch_shapes=[pltpu.VMEM((plan.tile_m, plan.tile_n), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=cost_of(
            arrays["x"],
            out_shape,
            flops=2 * plan.rows * plan.channels * plan.inputs,
            more_bytes=weights.nbytes // len(weights) * num_matrices,
        ),
        interpret=target.interpret,
        name="grouped_matmul",
    )(*_scalars(table, computes), *arrays.values())
    return out[:num_rows]


def _scalars(table: TileTable, computes: Array) -> tuple[Array, ...]:
    return table.groups, table.starts, table.ends, computes.astype(jnp.int32)


def _make_plan(
    x: Float[Array, "T K"], weights: Shaped[Array, "X N K"], target: Target
) -> _Plan:
    (num_rows, inputs), (groups, channels, _) = x.shape, weights.shape
    label = "few" if num_rows <= 16 * groups else "many"
    key = f"tpu {x.dtype} {weights.dtype} {label} {groups}x{channels}x{inputs}"
    sizes = tuned_sizes("grouped_matmul", target, key, DEFAULT_SIZES)
    unit = min_rows(x.dtype)
    rows = -(-num_rows // unit) * unit
    tile_k = fitting_tile(inputs, LANES, sizes["tile_k"] * 4 // (2 + x.dtype.itemsize))
    if tile_k > 4 * DEFAULT_SIZES["tile_k"]:
        raise NotImplementedError(f"{inputs} inputs are no multiple of {LANES}")
    tile_n = fitting_tile(channels, LANES, sizes["tile_n"])
    return _Plan(
        rows=rows,
        channels=channels,
        inputs=inputs,
        tile_m=min(sizes["tile_m"], rows),
        tile_n=covering_tile(tile_n, sizes["tile_n"]),
        tile_k=tile_k,
    )


def _specs(plan: _Plan) -> dict[str, pl.BlockSpec]:
    """Places of the tiles; of the tables, `c` says which visits have a product."""
    last = plan.steps - 1

    def row(starts: Any, i: Any) -> Any:
        return jax.lax.div(starts[i], jnp.int32(plan.tile_m))

    def step(computes: Any, i: Any, k: Any) -> Any:
        # A visit without product stays where the one before it ended: no copy.
        return jnp.where(computes[i] > 0, k, last)

    def at_rows(_n: Any, i: Any, k: Any, _g: Any, starts: Any, _e: Any, c: Any) -> Any:
        return row(starts, i), step(c, i, k)

    def at_matrix(n: Any, i: Any, k: Any, g: Any, _s: Any, _e: Any, c: Any) -> Any:
        return g[i], n, step(c, i, k)

    def at_scales(n: Any, i: Any, _k: Any, g: Any, _s: Any, _e: Any, _c: Any) -> Any:
        return g[i], 0, n

    def at_out(n: Any, i: Any, _k: Any, _g: Any, starts: Any, _e: Any, _c: Any) -> Any:
        return row(starts, i), n

    return {
        "x": pl.BlockSpec((plan.tile_m, plan.tile_k), at_rows),
        "weights": pl.BlockSpec((None, plan.tile_n, plan.tile_k), at_matrix),
        "scales": pl.BlockSpec((None, 1, plan.tile_n), at_scales),
        "out": pl.BlockSpec((plan.tile_m, plan.tile_n), at_out),
    }


def _kernel(
    _: Any,
    starts_ref: Any,
    ends_ref: Any,
    computes_ref: Any,
    x_ref: Any,
    weights_ref: Any,
    *refs: Any,
    has_scales: bool,
    plan: _Plan,
) -> None:
    out_ref, sums_ref = refs[-2:]
    i, k = pl.program_id(1), pl.program_id(2)
    start, end = starts_ref[i], ends_ref[i]
    tile = jax.lax.div(start, jnp.int32(plan.tile_m))
    before = jax.lax.div(starts_ref[jnp.maximum(i - 1, 0)], jnp.int32(plan.tile_m))

    @pl.when((k == 0) & ((i == 0) | (tile != before)))
    def _first_visit() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(computes_ref[i] > 0)
    def _visit() -> None:
        @pl.when(k == 0)
        def _start() -> None:
            sums_ref[...] = jnp.zeros_like(sums_ref)

        w = convert(weights_ref[...], x_ref.dtype)
        sums_ref[...] += multiply(x_ref[...], w, jnp.float32)

        @pl.when(k == plan.steps - 1)
        def _finish() -> None:
            sums = sums_ref[...]
            if has_scales:
                sums = sums * refs[0][...].astype(jnp.float32)
            shape = (plan.tile_m, plan.tile_n)
            places = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            places = places + tile * plan.tile_m
            own = (places >= start) & (places < end)
            before = out_ref[...].astype(jnp.float32)
            out_ref[...] = jnp.where(own, sums, before).astype(out_ref.dtype)
