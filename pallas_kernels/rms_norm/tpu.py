"""Mosaic TPU: tiles of whole rows."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from pallas_kernels.common.cost import cost_of
from pallas_kernels.common.elementwise import largest_value, saturate, struct
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes
from pallas_kernels.rms_norm.reference import Normed, Quantize

LANES = 128
MAX_WIDTH = 32768
VALUES_PER_TILE = 1 << 19
# A tile of bytes has this many rows.
MULTIPLE = 32


def rms_norm_tpu(
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
    if width % LANES or width > MAX_WIDTH:
        raise NotImplementedError(
            f"width {width} is no multiple of {LANES} lanes up to {MAX_WIDTH}"
        )
    if x.dtype not in (jnp.float32, jnp.bfloat16) or weight.dtype == jnp.float16:
        raise NotImplementedError(f"x of {x.dtype} with weight of {weight.dtype}")
    default = {"rows": max(MULTIPLE, VALUES_PER_TILE // width // MULTIPLE * MULTIPLE)}
    sizes = tuned_sizes("rms_norm", target, f"{x.dtype}/{width}", default)
    rows = min(sizes["rows"], num_tokens)
    tile = pl.BlockSpec((rows, width), lambda i: (i, 0))
    outputs, out_specs = [struct(x.shape, quantize or x.dtype)], [tile]
    if residual is not None:
        outputs.append(struct(x.shape, x.dtype))
        out_specs.append(tile)
    if quantize is not None:
        outputs.append(struct((num_tokens, 1), "float32"))
        out_specs.append(pl.BlockSpec((rows, 1), lambda i: (i, 0)))
    arrays, in_specs = [x, weight[None]], [tile, pl.BlockSpec((1, width), _first)]
    if residual is not None:
        arrays.append(residual)
        in_specs.append(tile)
    kernel = partial(
        _kernel,
        epsilon=epsilon,
        quantize=quantize,
        weight_offset=weight_offset,
        has_residual=residual is not None,
    )
    results = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(num_tokens, rows),),
        out_shape=outputs,
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=cost_of(
            *arrays, *outputs, flops=6 * x.size, exponentials=num_tokens
        ),
        interpret=target.interpret,
        name="rms_norm",
    )(*arrays)
    return Normed(
        results[0],
        None if residual is None else results[1],
        None if quantize is None else results[-1][:, 0],
    )


def _first(i: Any) -> tuple[int, int]:
    del i
    return 0, 0


def _kernel(
    *refs: Any,
    epsilon: float,
    quantize: Quantize | None,
    weight_offset: int,
    has_residual: bool,
) -> None:
    inputs, outputs = refs[: 2 + has_residual], refs[2 + has_residual :]
    wide = inputs[0][...].astype(jnp.float32)
    dtype = inputs[0].dtype
    if has_residual:
        total = (wide + inputs[2][...].astype(jnp.float32)).astype(dtype)
        outputs[1][...] = total
        wide = total.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean + epsilon)
    factor = inputs[1][...].astype(jnp.float32)
    if weight_offset:
        out = (normed * (factor + float(weight_offset))).astype(dtype)
    else:
        out = (normed.astype(dtype).astype(jnp.float32) * factor).astype(dtype)
    if quantize is not None:
        wide = out.astype(jnp.float32)
        largest = jnp.max(jnp.abs(wide), axis=1, keepdims=True)
        scales = jnp.where(largest > 0, largest / largest_value(quantize), 1.0)
        outputs[-1][...] = scales
        out = saturate(wide / scales, quantize)
    outputs[0][...] = out
