"""Pallas on TPU: weights come into VMEM as they are stored and are converted there.

The grid runs over rows, channels and inputs; the compiler's pipeline copies the next
tiles while the matrix units work. Sums stay in VMEM over the inputs.
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
from jaxtyping import Float, Shaped

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
from pallas_kernels.quantized_matmul.weights import (
    MIDDLE_ZERO,
    PACK_BLOCK,
    QuantizedWeight,
)

HALF = PACK_BLOCK // 2
DEFAULT_SIZES = {"tile_m": 256, "tile_n": 512, "tile_k": 2048}


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """Static facts of one call.

    Attributes:
        rows: M, filled up to a register's rows.
        channels: N.
        inputs: K, filled up to whole blocks for int4.
        group: Inputs that share a scale; 0 but for int4.
        tile_m: Rows of a tile.
        tile_n: Channels of a tile.
        tile_k: Inputs of a step.
        product: Type in which tiles are multiplied.
        sums: Type of the sums.
    """

    rows: int
    channels: int
    inputs: int
    group: int
    tile_m: int
    tile_n: int
    tile_k: int
    product: Any
    sums: Any

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tiles of rows, channels and inputs."""
        return (
            pl.cdiv(self.rows, self.tile_m),
            pl.cdiv(self.channels, self.tile_n),
            self.inputs // self.tile_k,
        )


def quantized_matmul_tpu(
    x: Shaped[Array, "M K"],
    weight: QuantizedWeight,
    x_scales: Float[Array, " M"] | None,
    out_dtype: DTypeLike,
    *,
    target: Target,
) -> Float[Array, "M N"]:
    """As the reference; int4 groups are of 32, 64 or a multiple of 128 inputs."""
    if 0 in (x.shape[0], x.shape[1], weight.num_channels):
        raise NotImplementedError("empty matrices")
    plan = _make_plan(x, weight, target)
    if weight.order is not None:
        x = jnp.take(x, weight.order, axis=1)
    num_rows, num_inputs = x.shape
    more_rows = plan.rows - num_rows
    x = jnp.pad(x, ((0, more_rows), (0, plan.inputs - num_inputs)))
    if x_scales is not None:
        x_scales = jnp.pad(x_scales, (0, more_rows))
    operands, scratch = _operands(x, weight, x_scales, plan)
    out_shape = jax.ShapeDtypeStruct((plan.rows, plan.channels), out_dtype)
    out = pl.pallas_call(
        partial(_kernel, names=tuple(operands), plan=plan),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=plan.grid,
            in_specs=[spec for _, spec in operands.values()],
            out_specs=pl.BlockSpec((plan.tile_m, plan.tile_n), lambda m, n, _: (m, n)),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=cost_of(
            out_shape,
            *(array for array, _ in operands.values()),
            flops=2 * plan.rows * plan.channels * plan.inputs,
        ),
        interpret=target.interpret,
        name="quantized_matmul",
    )(*(array for array, _ in operands.values()))
    return out[:num_rows] if more_rows else out


def _operands(
    x: Shaped[Array, "M K"],
    weight: QuantizedWeight,
    x_scales: Float[Array, " M"] | None,
    plan: _Plan,
) -> tuple[dict[str, tuple[Array, pl.BlockSpec]], list[Any]]:
    """Arrays with the places of their tiles, by name, and the scratch memory."""

    def of_row(m: Any, _n: Any, _k: Any) -> Any:
        return m, 0

    def of_column(_m: Any, n: Any, _k: Any) -> Any:
        return 0, n

    width = plan.tile_k // 2 if plan.group else plan.tile_k
    x_spec = pl.BlockSpec((plan.tile_m, plan.tile_k), lambda m, _, k: (m, k))
    w_spec = pl.BlockSpec((plan.tile_n, width), lambda _, n, k: (n, k))
    operands = {"x": (x, x_spec), "values": (weight.values, w_spec)}
    scratch: list[Any] = [pltpu.VMEM((plan.tile_m, plan.tile_n), plan.sums)]
    if plan.group:
        groups = weight.scales.shape[1]
        group_spec = pl.BlockSpec((groups, plan.tile_n), of_column)
        for name, array in (("scales", weight.scales), ("zeros", weight.zeros)):
            if array is not None:
                # Few groups: the compiler keeps such arrays transposed anyway.
                operands[name] = (array.T, group_spec)
                scratch.append(pltpu.VMEM((groups, plan.tile_n), jnp.float32))
    elif weight.scales is not None:
        column_spec = pl.BlockSpec((1, plan.tile_n), of_column)
        operands["scales"] = (weight.scales.reshape(1, -1), column_spec)
    if x_scales is not None:
        row_spec = pl.BlockSpec((plan.tile_m, 1), of_row)
        operands["x_scales"] = (x_scales.reshape(-1, 1), row_spec)
    return operands, scratch


def _make_plan(
    x: Shaped[Array, "M K"], weight: QuantizedWeight, target: Target
) -> _Plan:
    num_rows, inputs = x.shape
    is_int4 = weight.scheme == "int4"
    product, sums = contraction_types(
        x.dtype, x.dtype if is_int4 else weight.values.dtype, target.generation
    )
    group = 0
    unit = LANES
    if is_int4:
        group = inputs // weight.scales.shape[1]
        if group % HALF and group not in (32, 64):
            raise NotImplementedError(
                f"groups of {group} inputs; they must be 32, 64 or a multiple of {HALF}"
            )
        inputs = -(-inputs // PACK_BLOCK) * PACK_BLOCK
        unit = PACK_BLOCK
    label = "few" if num_rows <= 16 else "some" if num_rows <= 128 else "many"
    key = f"tpu {x.dtype} {weight.values.dtype} {label} {weight.num_channels}x{inputs}"
    sizes = tuned_sizes("quantized_matmul", target, key, DEFAULT_SIZES)
    rows = max(num_rows, min_rows(x.dtype))
    tile_k = fitting_tile(inputs, unit, sizes["tile_k"] * 4 // (2 + x.dtype.itemsize))
    if tile_k > 4 * DEFAULT_SIZES["tile_k"]:
        raise NotImplementedError(f"{inputs} inputs are no multiple of {unit}")
    return _Plan(
        rows=rows,
        channels=weight.num_channels,
        inputs=inputs,
        group=group,
        tile_m=min(sizes["tile_m"], -(-rows // 32) * 32) if rows > 32 else rows,
        tile_n=covering_tile(weight.num_channels, sizes["tile_n"]),
        tile_k=tile_k,
        product=product,
        sums=sums,
    )


def _kernel(*refs: Any, names: tuple[str, ...], plan: _Plan) -> None:
    inputs = dict(zip(names, refs, strict=False))
    out_ref, sums_ref, *group_refs = refs[len(names) :]
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _start() -> None:
        sums_ref[...] = jnp.zeros_like(sums_ref)
        for name, ref in zip(("scales", "zeros"), group_refs, strict=False):
            ref[...] = convert(inputs[name][...], jnp.float32)

    if plan.group:
        _add_int4(inputs, sums_ref, group_refs, plan)
    else:
        x = convert(inputs["x"][...], plan.product)
        w = convert(inputs["values"][...], plan.product)
        sums_ref[...] += multiply(x, w, plan.sums)

    @pl.when(k == plan.grid[2] - 1)
    def _finish() -> None:
        out = sums_ref[...].astype(jnp.float32)
        if "scales" in inputs and not plan.group:
            out = out * inputs["scales"][...].astype(jnp.float32)
        if "x_scales" in inputs:
            out = out * inputs["x_scales"][...].astype(jnp.float32)
        out_ref[...] = out.astype(out_ref.dtype)


def _add_int4(
    inputs: dict[str, Any], sums_ref: Any, group_refs: list[Any], plan: _Plan
) -> None:
    """Adds the products of some blocks; scales and zero points apply to the sums."""
    first = pl.program_id(2) * plan.tile_k
    last_group = group_refs[0].shape[0] - 1
    piece = min(plan.group, HALF)

    def add(k: int, w: Array) -> None:
        # Not //, whose treatment of signs the kernels' compiler does not know.
        group = jax.lax.div(first + k, jnp.int32(plan.group))
        at = pl.ds(jnp.minimum(group, last_group), 1)
        x = inputs["x"][:, k : k + piece]
        zeros: Any = jnp.float32(MIDDLE_ZERO)
        if len(group_refs) > 1:
            zeros = group_refs[1][at, :]
        total = jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)
        part = multiply(x, w, plan.sums) - total * zeros
        sums_ref[...] += part * group_refs[0][at, :]

    for block in range(plan.tile_k // PACK_BLOCK):
        packed = inputs["values"][:, block * HALF : (block + 1) * HALF]
        packed = packed.astype(jnp.int32)
        for half, nibbles in enumerate((packed & 15, packed >> 4)):
            values = nibbles.astype(jnp.float32).astype(plan.product)
            for start in range(0, HALF, piece):
                k = block * PACK_BLOCK + half * HALF + start
                add(k, values[:, start : start + piece])
