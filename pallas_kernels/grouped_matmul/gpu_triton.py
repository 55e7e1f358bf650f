"""Pallas on Triton: one program per tile of rows of one group and tile of channels.

Tiles start where their group starts, so that no matrix is read for another group's
rows. Tiles that are not needed end at once. Few rows split the inputs over the grid if
tiles alone do not fill the device; the parts are added in a fixed order.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.matmul_triton import (
    bound,
    contraction_types,
    load_run,
    load_tile,
    multiply,
    num_splits,
    store_tile,
)
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes
from pallas_kernels.grouped_matmul.tiles import max_tiles, tile_table

FLOAT8_TYPES = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """Static facts of one call: sizes T, X, N and K, and those of tiles."""

    rows: int
    groups: int
    channels: int
    inputs: int
    tile_m: int
    tile_n: int
    tile_k: int
    splits: int
    num_warps: int
    num_stages: int

    @property
    def steps(self) -> int:
        """Steps over all inputs."""
        return -(-self.inputs // self.tile_k)

    @property
    def split_steps(self) -> int:
        """Steps of each part."""
        return -(-self.steps // self.splits)


def grouped_matmul_gpu_triton(
    x: Float[Array, "T K"],
    weights: Shaped[Array, "X N K"],
    group_sizes: Int[Array, " X"],
    scales: Float[Array, "X N"] | None,
    out_dtype: DTypeLike,
    *,
    target: Target,
) -> Float[Array, "T N"]:
    """As the reference; 16-bit tiles go to the tensor cores."""
    _check_target(x, weights, target)
    plan = _make_plan(x, weights, target)
    table = tile_table(group_sizes, plan.rows, plan.tile_m, aligned=False)
    arrays = [table.groups, table.starts, table.ends, x, weights]
    if scales is not None:
        arrays.append(scales)
    shape = (plan.splits, plan.rows, plan.channels)
    part_dtype = out_dtype if plan.splits == 1 else jnp.float32
    parts = pl.pallas_call(
        partial(_kernel, plan=plan),
        out_shape=jax.ShapeDtypeStruct(shape, part_dtype),
        grid=(pl.cdiv(plan.channels, plan.tile_n), table.groups.shape[0], plan.splits),
        compiler_params=pltriton.CompilerParams(
            num_warps=plan.num_warps, num_stages=plan.num_stages
        ),
        interpret=target.interpret,
        name="grouped_matmul",
    )(*arrays)
    if plan.splits == 1:
        return parts[0]
    return jnp.sum(parts, axis=0).astype(out_dtype)


def _check_target(
    x: Float[Array, "T K"], weights: Shaped[Array, "X N K"], target: Target
) -> None:
    capability = target.generation.removeprefix("sm_").rstrip("af")
    if capability.isdigit() and int(capability) < 80:
        raise NotImplementedError(f"{target.generation} has no bfloat16 tensor cores")
    if weights.dtype in FLOAT8_TYPES and target.generation:
        if not capability.isdigit():
            raise NotImplementedError(f"float8 is not known on {target.generation}")
        if int(capability) < 89:
            raise NotImplementedError(f"{target.generation} has no float8")
    if 0 in (*x.shape, *weights.shape):
        raise NotImplementedError("empty arrays")


def _make_plan(
    x: Float[Array, "T K"], weights: Shaped[Array, "X N K"], target: Target
) -> _Plan:
    (rows, inputs), (groups, channels, _) = x.shape, weights.shape
    per_group = rows // groups
    kind = "few" if per_group <= 16 else "some" if per_group <= 64 else "many"
    key = f"triton {x.dtype} {weights.dtype} {kind} {groups}x{channels}x{inputs}"
    default = _default_sizes(kind, x.dtype.itemsize, weights.dtype.itemsize)
    sizes = tuned_sizes("grouped_matmul", target, key, default)
    plan = _Plan(
        rows=rows,
        groups=groups,
        channels=channels,
        inputs=inputs,
        tile_m=sizes["tile_m"],
        tile_n=sizes["tile_n"],
        tile_k=sizes["tile_k"],
        splits=1,
        num_warps=sizes["num_warps"],
        num_stages=sizes["num_stages"],
    )
    num_tiles = max_tiles(groups, rows, plan.tile_m, aligned=False)
    programs = num_tiles * pl.cdiv(channels, plan.tile_n)
    splits = sizes["splits"] or num_splits(programs, plan.steps, target.num_cores)
    return dataclasses.replace(plan, splits=splits)


def _default_sizes(kind: str, x_bytes: int, w_bytes: int) -> dict[str, int]:
    """Tiles without measurement; splits 0 leaves them to the number of programs."""
    if x_bytes == 4:  # no tensor cores: small tiles keep the sums in registers
        sizes = {"tile_m": 16 if kind == "few" else 32, "tile_n": 32, "tile_k": 32}
        return {**sizes, "num_warps": 4, "num_stages": 2, "splits": 0}
    if kind == "few":
        sizes = {"tile_m": 16, "tile_n": 64, "tile_k": 256 // w_bytes}
        return {**sizes, "num_warps": 4, "num_stages": 4, "splits": 0}
    if kind == "some":
        sizes = {"tile_m": 64, "tile_n": 128, "tile_k": 64}
        return {**sizes, "num_warps": 4, "num_stages": 4, "splits": 1}
    sizes = {"tile_m": 128, "tile_n": 128, "tile_k": 64}
    return {**sizes, "num_warps": 8, "num_stages": 4, "splits": 1}


def _kernel(
    groups_ref: Any,
    starts_ref: Any,
    ends_ref: Any,
    x_ref: Any,
    weights_ref: Any,
    *refs: Any,
    plan: _Plan,
) -> None:
    """Programs of one tile of rows follow each other: memory gives it once."""
    *scales_refs, out_ref = refs
    n, tile, split = (pl.program_id(axis) for axis in range(3))
    group, start, end = groups_ref[tile], starts_ref[tile], ends_ref[tile]
    column = n * plan.tile_n
    limit_n = bound(plan.channels, plan.tile_n)
    limit_k = bound(plan.inputs, plan.tile_k)
    _, sum_dtype = contraction_types(x_ref.dtype, weights_ref.dtype)

    @pl.when(start < end)
    def _live() -> None:
        first = split * plan.split_steps
        last = jnp.minimum(first + plan.split_steps, plan.steps)
        # Rows of no group read nothing and remain zero.
        last = jnp.where(group < plan.groups, last, first)

        def step(i: Any, sums: Array) -> Array:
            k = i * plan.tile_k
            w = load_tile(
                weights_ref,
                (group,),
                (column, k),
                (plan.tile_n, plan.tile_k),
                (limit_n, limit_k),
            )
            x = load_tile(
                x_ref, (), (start, k), (plan.tile_m, plan.tile_k), (end, limit_k)
            )
            return sums + multiply(w.astype(x.dtype), x, sum_dtype)

        sums = jnp.zeros((plan.tile_n, plan.tile_m), sum_dtype)
        sums = jax.lax.fori_loop(first, last, step, sums)
        if scales_refs:
            own = jnp.minimum(group, plan.groups - 1)
            scales = load_run(scales_refs[0], (own,), column, plan.tile_n, limit_n)
            sums = sums * scales.astype(jnp.float32)[:, None]
        out = sums.T.astype(out_ref.dtype)
        store_tile(out_ref, (split,), (start, column), out, (end, limit_n))
