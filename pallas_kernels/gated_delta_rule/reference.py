"""The obvious version: token after token; differentiable."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.common.chunks import rows_of_tokens


def gated_delta_rule_reference(
    q: Float[Array, "T K Dk"],
    k: Float[Array, "T K Dk"],
    v: Float[Array, "T H Dv"],
    g: Float[Array, "T H"],
    beta: Float[Array, "T H"],
    state: Float[Array, "S H Dk Dv"],
    row_starts: Int[Array, " S+1"],
) -> tuple[Float[Array, "T H Dv"], Float[Array, "S H Dk Dv"]]:
    """Scans over the tokens in float32; see `api.gated_delta_rule`."""
    rows = rows_of_tokens(row_starts, v.shape[0])

    def one_token(states: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        row, *values = token
        out, new = _advance(states.at[row].get(mode="clip"), *values)
        out = jnp.where(row < states.shape[0], out, 0)
        return states.at[row].set(new, mode="drop"), out.astype(v.dtype)

    states, out = jax.lax.scan(one_token, state, (rows, q, k, v, g, beta))
    return out, states


def gated_delta_step_reference(
    q: Float[Array, "T K Dk"],
    k: Float[Array, "T K Dk"],
    v: Float[Array, "T H Dv"],
    g: Float[Array, "T H"],
    beta: Float[Array, "T H"],
    state: Float[Array, "R H Dk Dv"],
    rows: Int[Array, " T"],
) -> tuple[Float[Array, "T H Dv"], Float[Array, "R H Dk Dv"]]:
    """Gathers the rows, advances and scatters them; see `api.gated_delta_step`."""
    num_rows = state.shape[0]
    is_live = (rows >= 0) & (rows < num_rows)
    old = state.at[rows].get(mode="clip")
    out, new = jax.vmap(_advance)(old, q, k, v, g, beta)
    out = jnp.where(is_live[:, None, None], out, 0).astype(v.dtype)
    targets = jnp.where(is_live, rows, num_rows)
    return out, state.at[targets].set(new, mode="drop")


def _advance(
    state: Float[Array, "H Dk Dv"],
    q: Float[Array, "K Dk"],
    k: Float[Array, "K Dk"],
    v: Float[Array, "H Dv"],
    g: Float[Array, " H"],
    beta: Float[Array, " H"],
) -> tuple[Float[Array, "H Dv"], Float[Array, "H Dk Dv"]]:
    group = v.shape[0] // k.shape[0]
    query = jnp.repeat(q.astype(jnp.float32), group, axis=0)
    key = jnp.repeat(k.astype(jnp.float32), group, axis=0)
    decayed = jnp.exp(g)[:, None, None] * state
    wrong = v.astype(jnp.float32) - jnp.einsum("hkv,hk->hv", decayed, key)
    new = decayed + key[:, :, None] * (beta[:, None] * wrong)[:, None, :]
    return jnp.einsum("hkv,hk->hv", new, query), new
