"""The obvious version: token after token; differentiable."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.common.chunks import rows_of_tokens


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
    rows = rows_of_tokens(row_starts, x.shape[0])

    def one_token(states: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        row, *values = token
        old = states.at[row].get(mode="clip")
        y, new = _advance(old, A, D, *values)
        y = jnp.where(row < states.shape[0], y, 0)
        return states.at[row].set(new, mode="drop"), y.astype(x.dtype)

    states, y = jax.lax.scan(one_token, state, (rows, x, dt, B, C))
    return y, states


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
    num_rows = state.shape[0]
    is_live = (rows >= 0) & (rows < num_rows)
    old = state.at[rows].get(mode="clip")
    y, new = jax.vmap(_advance, (0, None, None, 0, 0, 0, 0))(old, A, D, x, dt, B, C)
    y = jnp.where(is_live[:, None, None], y, 0).astype(x.dtype)
    targets = jnp.where(is_live, rows, num_rows)
    return y, state.at[targets].set(new, mode="drop")


def _advance(
    state: Float[Array, "H P N"],
    A: Float[Array, " H"],
    D: Float[Array, " H"],
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
