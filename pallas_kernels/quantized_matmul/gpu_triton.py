"""Pallas on Triton: products with stored weights, on NVIDIA GPUs from sm_80 on.

Few rows are bound by the bytes of the weights: the inputs are split over the grid where
the channels alone do not fill the device, and the float32 (int32) parts are added in a
fixed order. One row needs no tensor cores. Many rows take larger tiles of the same
program, or where nothing is to be converted XLA's product.
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
from jaxtyping import Float, Shaped

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
from pallas_kernels.quantized_matmul.reference import contract
from pallas_kernels.quantized_matmul.weights import (
    FLOAT8_TYPES,
    MIDDLE_ZERO,
    PACK_BLOCK,
    QuantizedWeight,
)

HALF = PACK_BLOCK // 2
MIN_DOT = 16  # shortest side of a tensor core's tile
# Beyond, factors of one type are XLA's own business: it chooses by measurement between
# the vendor's library and its own kernels. (A CPU that interprets has no such choice.)
MAX_ROWS_OF_ONE_TYPE = 128
# Of each type: offset, its high byte four times, two ones, and the name in PTX.
PTX_OFFSETS = {
    jnp.dtype(jnp.bfloat16): (128.0, "0x43434343", "0x3f803f80", "bf16x2"),
    jnp.dtype(jnp.float16): (1024.0, "0x64646464", "0x3c003c00", "f16x2"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """Static facts of one call.

    Attributes:
        rows: M.
        channels: N.
        inputs: K.
        group: Inputs that share a scale; 0 but for int4.
        tile_m: Rows of a tile.
        tile_n: Channels of a tile.
        tile_k: Bytes, or weights if they are not packed, of a step.
        splits: Parts of the sums.
        num_warps: Warps of a program.
        num_stages: Steps whose loads are in flight.
        product: Type in which tiles are multiplied.
        sums: Type of the sums.
        has_ptx: Whether the target's assembler is NVIDIA's.
    """

    rows: int
    channels: int
    inputs: int
    group: int
    tile_m: int
    tile_n: int
    tile_k: int
    splits: int
    num_warps: int
    num_stages: int
    product: Any
    sums: Any
    has_ptx: bool

    @property
    def steps(self) -> int:
        """Steps over all inputs; a packed byte holds two of them."""
        if not self.group:
            return -(-self.inputs // self.tile_k)
        # The last block of 256 may lack its second half, or a part of its first.
        return -(-self.inputs // PACK_BLOCK) * (HALF // self.tile_k)

    @property
    def split_steps(self) -> int:
        """Steps of each part."""
        return -(-self.steps // self.splits)


def quantized_matmul_gpu_triton(
    x: Shaped[Array, "M K"],
    weight: QuantizedWeight,
    x_scales: Float[Array, " M"] | None,
    out_dtype: DTypeLike,
    *,
    target: Target,
) -> Float[Array, "M N"]:
    """As the reference; bfloat16, float16 and 8-bit tiles go to the tensor cores."""
    _check_target(x, weight, target)
    if weight.order is not None:
        x = jnp.take(x, weight.order, axis=1)
    many = x.shape[0] > MAX_ROWS_OF_ONE_TYPE and not target.interpret
    if many and x.dtype == weight.values.dtype:
        sums = contraction_types(x.dtype, x.dtype)[1]
        out = contract(x, weight.values, sums)
        return _scale(out, weight, x_scales, out_dtype)
    plan = _make_plan(x, weight, target)
    arrays = {
        "x": x,
        "values": weight.values,
        "scales": weight.scales,
        "zeros": weight.zeros,
        "x_scales": x_scales,
    }
    in_place = plan.splits == 1
    if not in_place and not plan.group:
        arrays |= {"scales": None, "x_scales": None}
    present = {name: array for name, array in arrays.items() if array is not None}
    out = _run(present, plan, out_dtype if in_place else None, target)
    if in_place:
        return out
    # Always in the same order.
    return _scale(jnp.sum(out, axis=0), weight, x_scales, out_dtype)


def _run(
    arrays: dict[str, Array], plan: _Plan, out_dtype: DTypeLike | None, target: Target
) -> Array:
    """Gives the scaled product, or without a type for it the sums of each part."""
    shape = (plan.rows, plan.channels)
    out_shape = jax.ShapeDtypeStruct((plan.splits, *shape), plan.sums)
    if out_dtype is not None:
        out_shape = jax.ShapeDtypeStruct(shape, out_dtype)
    return pl.pallas_call(
        partial(_kernel, names=tuple(arrays), plan=plan),
        out_shape=out_shape,
        grid=(
            pl.cdiv(plan.rows, plan.tile_m),
            pl.cdiv(plan.channels, plan.tile_n),
            plan.splits,
        ),
        compiler_params=pltriton.CompilerParams(
            num_warps=plan.num_warps, num_stages=plan.num_stages
        ),
        interpret=target.interpret,
        name="quantized_matmul",
    )(*arrays.values())


def _scale(
    sums: Shaped[Array, "M N"],
    weight: QuantizedWeight,
    x_scales: Float[Array, " M"] | None,
    out_dtype: DTypeLike,
) -> Float[Array, "M N"]:
    out = sums.astype(jnp.float32)
    if weight.scheme in ("int8", "float8"):
        out = out * weight.scales.astype(jnp.float32)[None, :]
    if x_scales is not None:
        out = out * x_scales.astype(jnp.float32)[:, None]
    return out.astype(out_dtype)


def _check_target(
    x: Shaped[Array, "M K"], weight: QuantizedWeight, target: Target
) -> None:
    types = {jnp.dtype(x.dtype), jnp.dtype(weight.values.dtype)}
    capability = target.generation.removeprefix("sm_").rstrip("af")
    if capability.isdigit() and int(capability) < 80:
        raise NotImplementedError(f"{target.generation} has no bfloat16 tensor cores")
    if types & set(map(jnp.dtype, FLOAT8_TYPES)):
        if not capability.isdigit() and target.generation:
            raise NotImplementedError(f"float8 is not known on {target.generation}")
        if capability.isdigit() and int(capability) < 89:
            raise NotImplementedError(f"{target.generation} has no float8")
    if 0 in (x.shape[0], x.shape[1], weight.num_channels):
        raise NotImplementedError("empty matrices")


def _make_plan(
    x: Shaped[Array, "M K"], weight: QuantizedWeight, target: Target
) -> _Plan:
    rows, inputs = x.shape
    channels, scheme = weight.num_channels, weight.scheme
    group = 0
    if scheme == "int4":
        product, sums = x.dtype, jnp.dtype(jnp.float32)
        group = inputs // weight.scales.shape[1]
        if group < MIN_DOT or (HALF % group and group % HALF):
            raise NotImplementedError(
                f"groups of {group} inputs; they must be 16, 32, 64 or a multiple "
                f"of {HALF}"
            )
    else:
        product, sums = contraction_types(x.dtype, weight.values.dtype)
    label = "few" if rows <= 16 else "some" if rows <= 128 else "many"
    kind = "one" if rows == 1 and scheme != "int4" else label
    key = f"triton {x.dtype} {weight.values.dtype} {kind} {channels}x{inputs}"
    sizes = tuned_sizes(
        "quantized_matmul",
        target,
        key,
        _default_sizes(kind, rows, x.dtype.itemsize, weight.values.dtype.itemsize),
    )
    tile_k = min(sizes["tile_k"], group, HALF) if group else sizes["tile_k"]
    plan = _Plan(
        rows=rows,
        channels=channels,
        inputs=inputs,
        group=group,
        tile_m=sizes["tile_m"],
        tile_n=sizes["tile_n"],
        tile_k=tile_k,
        splits=1,
        num_warps=sizes["num_warps"],
        num_stages=sizes["num_stages"],
        product=product,
        sums=sums,
        has_ptx=target.generation.startswith("sm_") and not target.interpret,
    )
    programs = pl.cdiv(rows, plan.tile_m) * pl.cdiv(channels, plan.tile_n)
    splits = sizes["splits"] or num_splits(programs, plan.steps, target.num_cores)
    return dataclasses.replace(plan, splits=splits)


def _default_sizes(kind: str, rows: int, x_bytes: int, w_bytes: int) -> dict[str, int]:
    """Tiles without measurement; splits 0 leaves them to the number of programs."""
    if kind == "one":
        return {
            "tile_m": 1,
            "tile_n": 8,
            "tile_k": min(512, 1024 // w_bytes),
            "num_warps": 4 if w_bytes > 1 else 8,
            "num_stages": 1,
            "splits": 0,
        }
    if x_bytes == 4:  # no tensor cores: small tiles keep the sums in registers
        tile_m = 16 if kind == "few" else 32
        sizes = {"tile_m": tile_m, "tile_n": 32, "tile_k": 32}
        return {**sizes, "num_warps": 4, "num_stages": 2, "splits": 0}
    if kind == "few":
        sizes = {"tile_m": 16, "tile_n": 64, "tile_k": 256 // w_bytes}
        return {**sizes, "num_warps": 4, "num_stages": 4, "splits": 0}
    if kind == "some":
        tile_m = min(64, pl.next_power_of_2(rows))
        sizes = {"tile_m": tile_m, "tile_n": 64, "tile_k": 128}
        return {**sizes, "num_warps": 4, "num_stages": 4, "splits": 0}
    sizes = {"tile_m": 128, "tile_n": 128, "tile_k": 128 // x_bytes}
    return {**sizes, "num_warps": 8, "num_stages": 4, "splits": 1}


def _kernel(*refs: Any, names: tuple[str, ...], plan: _Plan) -> None:
    inputs = dict(zip(names, refs[:-1], strict=True))
    m, n, split = (pl.program_id(axis) for axis in range(3))
    starts = (m * plan.tile_m, n * plan.tile_n)
    first = split * plan.split_steps
    last = jnp.minimum(first + plan.split_steps, plan.steps)
    limits = (bound(plan.rows, plan.tile_m), bound(plan.channels, plan.tile_n))
    if plan.group:
        sums = _sum_int4(inputs, plan, starts, limits, (first, last))
    elif plan.tile_m == 1:
        sums = _sum_row(inputs, plan, starts, limits, (first, last))
    else:
        sums = _sum_tiles(inputs, plan, starts, limits, (first, last))
    if plan.splits > 1:
        store_tile(refs[-1], (split,), starts, sums.T, limits)
        return
    out = sums.astype(jnp.float32)
    if "scales" in inputs and not plan.group:
        scales = load_run(inputs["scales"], (), starts[1], plan.tile_n, limits[1])
        out = out * scales.astype(jnp.float32)[:, None]
    if "x_scales" in inputs:
        scales = load_run(inputs["x_scales"], (), starts[0], plan.tile_m, limits[0])
        out = out * scales.astype(jnp.float32)[None, :]
    store_tile(refs[-1], (), starts, out.T.astype(refs[-1].dtype), limits)


def _sum_tiles(
    inputs: dict[str, Any], plan: _Plan, starts: Any, limits: Any, steps: Any
) -> Array:
    """Sums `[tile_n, tile_m]` over the inputs of some steps."""
    limit_k = bound(plan.inputs, plan.tile_k)

    def step(i: Any, sums: Array) -> Array:
        k = i * plan.tile_k
        w = load_tile(
            inputs["values"],
            (),
            (starts[1], k),
            (plan.tile_n, plan.tile_k),
            (limits[1], limit_k),
        )
        x = load_tile(
            inputs["x"],
            (),
            (starts[0], k),
            (plan.tile_m, plan.tile_k),
            (limits[0], limit_k),
        )
        return sums + multiply(w.astype(plan.product), x, plan.sums)

    zero = jnp.zeros((plan.tile_n, plan.tile_m), plan.sums)
    return jax.lax.fori_loop(steps[0], steps[1], step, zero)


def _sum_row(
    inputs: dict[str, Any], plan: _Plan, starts: Any, limits: Any, steps: Any
) -> Array:
    """Sums `[tile_n, 1]` for the only row; each thread keeps its own sums.

    The compiler keeps several steps in flight only where tensor cores consume them;
    here each step asks for the weights of the next one before it uses its own.
    """
    limit_k = bound(plan.inputs, plan.tile_k)
    first, last = steps

    def load(i: Any) -> Array:
        start = (starts[1], jnp.minimum(i, last - 1) * plan.tile_k)
        size = (plan.tile_n, plan.tile_k)
        return load_tile(inputs["values"], (), start, size, (limits[1], limit_k))

    def step(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        sums, w = carry
        w_next = load(i + 1)
        start = (0, i * plan.tile_k)
        x = load_tile(inputs["x"], (), start, (1, plan.tile_k), (None, limit_k))
        return sums + w.astype(plan.sums) * x.astype(plan.sums), w_next

    zero = jnp.zeros((plan.tile_n, plan.tile_k), plan.sums)
    sums, _ = jax.lax.fori_loop(first, last, step, (zero, load(first)))
    return jnp.sum(sums, axis=1)[:, None]


def _sum_int4(
    inputs: dict[str, Any], plan: _Plan, starts: Any, limits: Any, steps: Any
) -> Array:
    """Sums `[tile_n, tile_m]`; each half of the bytes lies within one group.

    The scale of a group applies to its part of the sum, in float32. A step has its
    scales and zero points from the step before it, which does not wait for them.
    """
    m, n = starts
    first, last = steps
    steps_per_block = HALF // plan.tile_k
    # Bytes past the last input hold nothing; x is zero there.
    limit_k = bound(plan.inputs, PACK_BLOCK)
    last_group = plan.inputs // plan.group - 1

    def input_of(i: Any) -> Any:
        # Not // and %, which would look after signs.
        block = jax.lax.div(i, jnp.int32(steps_per_block))
        inside = jax.lax.rem(i, jnp.int32(steps_per_block)) * plan.tile_k
        return block * PACK_BLOCK + inside

    def load_group(name: str, k: Any) -> Array:
        group = jax.lax.div(k, jnp.int32(plan.group))
        start = (n, jnp.minimum(group, last_group))
        return load_tile(inputs[name], (), start, (plan.tile_n, 1), (limits[1], None))

    def load_groups(i: Any) -> tuple[Array, ...]:
        names = [name for name in ("scales", "zeros") if name in inputs]
        k = input_of(jnp.minimum(i, last - 1))
        return tuple(load_group(name, k + j) for j in (0, HALF) for name in names)

    def add_half(
        sums: Array, packed: Array, k: Any, group: Any, *, high: bool
    ) -> Array:
        size = (plan.tile_m, plan.tile_k)
        x = load_tile(inputs["x"], (), (m, k), size, (limits[0], limit_k))
        scales, *zeros = group
        w = _unpack(packed, zeros[0] if zeros else None, plan, high=high)
        return sums + multiply(w, x, plan.sums) * scales.astype(jnp.float32)

    def step(i: Any, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        sums, groups = carry
        groups_next = load_groups(i + 1)
        start, size = (n, i * plan.tile_k), (plan.tile_n, plan.tile_k)
        packed = load_tile(inputs["values"], (), start, size, (limits[1], None))
        middle = len(groups) // 2
        k = input_of(i)
        sums = add_half(sums, packed, k, groups[:middle], high=False)
        sums = add_half(sums, packed, k + HALF, groups[middle:], high=True)
        return sums, groups_next

    zero = jnp.zeros((plan.tile_n, plan.tile_m), plan.sums)
    sums, _ = jax.lax.fori_loop(first, last, step, (zero, load_groups(first)))
    return sums


def _unpack(packed: Array, zeros: Array | None, plan: _Plan, *, high: bool) -> Array:
    """One half of each byte less its zero point, exactly, in the type of x."""
    if plan.has_ptx and plan.product in PTX_OFFSETS:
        offset = PTX_OFFSETS[plan.product][0]
        if zeros is None:
            minus = jnp.full(packed.shape, -offset - MIDDLE_ZERO, plan.product)
        else:
            minus = (-offset - zeros.astype(jnp.float32)).astype(plan.product)
            minus = jnp.broadcast_to(minus, packed.shape)
        (half,) = pltriton.elementwise_inline_asm(
            unpacking_ptx(plan.product, high=high),
            args=[packed, minus],
            constraints="=r,=r,r,r,r",
            pack=4,
            result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, plan.product)],
        )
        return half
    half = packed >> jnp.uint8(4) if high else packed & jnp.uint8(15)
    zero = jnp.int8(MIDDLE_ZERO) if zeros is None else zeros.astype(jnp.int8)
    return (half.astype(jnp.int8) - zero).astype(plan.product)


def unpacking_ptx(dtype: Any, *, high: bool) -> str:
    """PTX that turns four bytes into four 16-bit floats of their low or high halves.

    A byte of the type's pattern for 128 or 1024 above four bits of integer is the
    float 128 + q or 1024 + q; adding the negative of that offset and the zero point,
    which come as four floats of that type, is exact. That is 1.4 instructions per
    weight, where conversion by way of integers takes five.

    Source: the trick is that of FasterTransformer's converters, arXiv:2211.10017.
    """
    pattern, one, name = PTX_OFFSETS[jnp.dtype(dtype)][1:]
    take_high = "shr.b32 q, $2, 4;" if high else "mov.b32 q, $2;"
    return f"""{{
        .reg .b32 q;
        .reg .b32 one;
        {take_high}
        and.b32 q, q, 0x0f0f0f0f;
        mov.b32 one, {one};
        prmt.b32 $0, q, {pattern}, 0x4140;
        prmt.b32 $1, q, {pattern}, 0x4342;
        fma.rn.{name} $0, $0, one, $3;
        fma.rn.{name} $1, $1, one, $4;
    }}"""
