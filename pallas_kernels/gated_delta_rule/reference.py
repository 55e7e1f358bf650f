"""The obvious version: token after token; differentiable."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.common.recurrent import scan_tokens, step_tokens


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
    return scan_tokens(_advance, (q, k, v, g, beta), state, row_starts, v.dtype)


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
    return step_tokens(_advance, (q, k, v, g, beta), state, rows, v.dtype)


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
