"""The obvious version: token after token; differentiable."""

from functools import partial

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.common.recurrent import scan_tokens, step_tokens


def ssm_scan_reference(
    x: Float[Array, "T H P"],
    dt: Float[Array, "T H"],
    A: Float[Array, " H"],
    B: Float[Array, "T G N"],
    C: Float[Array, "T G N"],
    D: Float[Array, " H"],
    state: Float[Array, "S H P N"],
    row_starts: Int[Array, " S+1"],
) -> tuple[Float[Array, "T H P"], Float[Array, "S H P N"]]:
    """Scans over the tokens in float32; see `api.ssm_scan`."""
    advance = partial(_advance, A, D)
    return scan_tokens(advance, (x, dt, B, C), state, row_starts, x.dtype)


def ssm_step_reference(
    x: Float[Array, "T H P"],
    dt: Float[Array, "T H"],
    A: Float[Array, " H"],
    B: Float[Array, "T G N"],
    C: Float[Array, "T G N"],
    D: Float[Array, " H"],
    state: Float[Array, "R H P N"],
    rows: Int[Array, " T"],
) -> tuple[Float[Array, "T H P"], Float[Array, "R H P N"]]:
    """Gathers the rows, advances them and scatters them; see `api.ssm_step`."""
    advance = partial(_advance, A, D)
    return step_tokens(advance, (x, dt, B, C), state, rows, x.dtype)


def _advance(
    A: Float[Array, " H"],
    D: Float[Array, " H"],
    state: Float[Array, "H P N"],
    x: Float[Array, "H P"],
    dt: Float[Array, " H"],
    B: Float[Array, "G N"],
    C: Float[Array, "G N"],
) -> tuple[Float[Array, "H P"], Float[Array, "H P N"]]:
    heads_per_group = x.shape[0] // B.shape[0]
    b = jnp.repeat(B.astype(jnp.float32), heads_per_group, axis=0)
    c = jnp.repeat(C.astype(jnp.float32), heads_per_group, axis=0)
    values = x.astype(jnp.float32)
    added = (dt[:, None] * values)[:, :, None] * b[:, None, :]
    new = jnp.exp(dt * A)[:, None, None] * state + added
    return jnp.einsum("hpn,hn->hp", new, c) + D[:, None] * values, new
