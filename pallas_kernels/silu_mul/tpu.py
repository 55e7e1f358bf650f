"""Mosaic TPU: tiles of rows and columns, the gate and the up half as two operands."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from pallas_kernels.common.cost import cost_of
from pallas_kernels.common.elementwise import Activation, activate, struct
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes

LANES = 128
SIZES = {"rows": 256, "columns": 1024}


def silu_mul_tpu(
    x: Float[Array, "T N"], activation: Activation, *, target: Target
) -> Float[Array, "T F"]:
    """Computes activation(gate) * up; see `api.silu_mul`."""
    num_tokens, width = x.shape
    half = width // 2
    if half % LANES:
        raise NotImplementedError(f"width {half} is no multiple of {LANES} lanes")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"x of {x.dtype}")
    if not x.size:
        return jnp.zeros((num_tokens, half), x.dtype)
    sizes = tuned_sizes("silu_mul", target, str(x.dtype), SIZES)
    rows = min(sizes["rows"], num_tokens)
    runs = half // LANES
    columns = LANES * max(
        n for n in range(1, sizes["columns"] // LANES + 1) if runs % n == 0
    )
    num_columns = half // columns
    out = struct((num_tokens, half), x.dtype)
    return pl.pallas_call(
        partial(_kernel, activation=activation),
        grid=(pl.cdiv(num_tokens, rows), num_columns),
        out_shape=out,
        in_specs=[
            pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
            pl.BlockSpec((rows, columns), lambda i, j: (i, j + num_columns)),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel")
        ),
        cost_estimate=cost_of(x, out, flops=8 * out.size, exponentials=out.size),
        interpret=target.interpret,
        name="silu_mul",
    )(x, x)


def _kernel(
    gate_ref: Any, up_ref: Any, out_ref: Any, *, activation: Activation
) -> None:
    gate = gate_ref[...]
    active = activate(gate.astype(jnp.float32), activation).astype(gate.dtype)
    product = active.astype(jnp.float32) * up_ref[...].astype(jnp.float32)
    out_ref[...] = product.astype(out_ref.dtype)
