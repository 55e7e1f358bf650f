"""Pallas on Triton: each program holds some whole rows in registers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float

from pallas_kernels.common.elementwise import (
    check_byte_float,
    largest_value,
    saturate,
    struct,
)
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes
from pallas_kernels.rms_norm.reference import Normed, Quantize

MAX_WIDTH = 32768
VALUES_PER_THREAD = 16
# Narrow rows share a program, so that its threads have something to do.
VALUES_PER_PROGRAM = 2048


def rms_norm_gpu_triton(
    x: Float[Array, "T E"],
    weight: Float[Array, " E"],
    residual: Float[Array, "T E"] | None,
    epsilon: float,
    quantize: Quantize | None,
    weight_offset: int,
    *,
    target: Target,
) -> Normed:
    """Normalises; see `api.rms_norm`."""
    num_tokens, width = x.shape
    if width > MAX_WIDTH:
        raise NotImplementedError(f"width {width} is above {MAX_WIDTH}")
    if x.dtype.itemsize not in (2, 4) or weight.dtype.itemsize not in (2, 4):
        raise NotImplementedError(f"x of {x.dtype} with weight of {weight.dtype}")
    if quantize is not None:
        check_byte_float(quantize, target.generation)
    padded = pl.next_power_of_2(width)
    rows = max(1, VALUES_PER_PROGRAM // padded)
    default = {"warps": min(16, max(4, rows * padded // (32 * VALUES_PER_THREAD)))}
    sizes = tuned_sizes("rms_norm", target, f"{x.dtype}/{padded}", default)
    outputs = [struct(x.shape, quantize or x.dtype)]
    if residual is not None:
        outputs.append(struct(x.shape, x.dtype))
    if quantize is not None:
        outputs.append(struct((num_tokens,), "float32"))
    arrays = [x, weight] if residual is None else [x, weight, residual]
    kernel = partial(
        _kernel,
        tile=(rows, padded),
        epsilon=epsilon,
        quantize=quantize,
        weight_offset=weight_offset,
        has_residual=residual is not None,
    )
    results = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(num_tokens, rows),),
        out_shape=outputs,
        in_specs=[pl.no_block_spec] * len(arrays),
        out_specs=[pl.no_block_spec] * len(outputs),
        compiler_params=pltriton.CompilerParams(num_warps=sizes["warps"], num_stages=1),
        interpret=target.interpret,
        name="rms_norm",
    )(*arrays)
    return Normed(
        results[0],
        None if residual is None else results[1],
        None if quantize is None else results[-1],
    )


def _kernel(
    *refs: Any,
    tile: tuple[int, int],
    epsilon: float,
    quantize: Quantize | None,
    weight_offset: int,
    has_residual: bool,
) -> None:
    inputs, outputs = refs[: 2 + has_residual], refs[2 + has_residual :]
    x_ref, weight_ref = inputs[:2]
    num_tokens, width = x_ref.shape
    dtype = x_ref.dtype
    rows = pl.program_id(0) * tile[0] + jnp.arange(tile[0], dtype=jnp.int32)
    columns = jnp.arange(tile[1], dtype=jnp.int32)
    row_index = jnp.broadcast_to(rows[:, None], tile)
    column_index = jnp.broadcast_to(columns[None, :], tile)
    index = (row_index, column_index)
    mask = (row_index < num_tokens) & (column_index < width)

    x = pltriton.load(x_ref.at[index], mask=mask, other=0.0)
    if has_residual:
        added = pltriton.load(inputs[2].at[index], mask=mask, other=0.0)
        x = (x.astype(jnp.float32) + added.astype(jnp.float32)).astype(dtype)
        pltriton.store(outputs[1].at[index], x, mask=mask)
    weight = pltriton.load(weight_ref.at[columns], mask=columns < width, other=0.0)
    wide = x.astype(jnp.float32)
    mean = jnp.sum(wide * wide, axis=1) / width
    normed = wide * jax.lax.rsqrt(mean + epsilon)[:, None]
    factor = weight.astype(jnp.float32)[None, :]
    if weight_offset:
        out = (normed * (factor + float(weight_offset))).astype(dtype)
    else:
        out = (normed.astype(dtype).astype(jnp.float32) * factor).astype(dtype)
    if quantize is not None:
        wide = jnp.where(mask, out.astype(jnp.float32), 0.0)
        largest = jnp.max(jnp.abs(wide), axis=1)
        scales = jnp.where(largest > 0, largest / largest_value(quantize), 1.0)
        pltriton.store(outputs[-1].at[rows], scales, mask=rows < num_tokens)
        out = saturate(wide / scales[:, None], quantize)
    pltriton.store(outputs[0].at[index], out, mask=mask)
