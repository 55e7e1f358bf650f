"""Pallas on Triton: one program per row and run of columns."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float

from pallas_kernels.common.elementwise import Activation, activate, struct
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes

SIZES = {"columns": 1024, "warps": 4}


def silu_mul_gpu_triton(
    x: Float[Array, "T N"], activation: Activation, *, target: Target
) -> Float[Array, "T F"]:
    """Computes activation(gate) * up; see `api.silu_mul`."""
    if x.dtype.itemsize not in (2, 4):
        raise NotImplementedError(f"x of {x.dtype}")
    num_tokens, width = x.shape
    if not x.size:
        return jnp.zeros((num_tokens, width // 2), x.dtype)
    sizes = tuned_sizes("silu_mul", target, str(x.dtype), SIZES)
    columns = sizes["columns"]
    return pl.pallas_call(
        partial(_kernel, activation=activation, columns=columns),
        grid=(num_tokens, pl.cdiv(width // 2, columns)),
        out_shape=struct((num_tokens, width // 2), x.dtype),
        in_specs=[pl.no_block_spec],
        out_specs=pl.no_block_spec,
        compiler_params=pltriton.CompilerParams(num_warps=sizes["warps"], num_stages=1),
        interpret=target.interpret,
        name="silu_mul",
    )(x)


def _kernel(x_ref: Any, out_ref: Any, *, activation: Activation, columns: int) -> None:
    half = out_ref.shape[1]
    row = pl.program_id(0)
    offsets = pl.program_id(1) * columns + jnp.arange(columns, dtype=jnp.int32)
    mask = offsets < half
    gate = pltriton.load(x_ref.at[row, offsets], mask=mask, other=0.0)
    up = pltriton.load(x_ref.at[row, half + offsets], mask=mask, other=0.0)
    active = activate(gate.astype(jnp.float32), activation).astype(gate.dtype)
    product = active.astype(jnp.float32) * up.astype(jnp.float32)
    pltriton.store(out_ref.at[row, offsets], product.astype(out_ref.dtype), mask=mask)
