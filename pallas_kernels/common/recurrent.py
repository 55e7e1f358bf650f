"""Layers that carry a state per sequence: their checks, and their plainest loops."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.common.chunks import rows_of_tokens

Advance = Callable[..., tuple[Array, Array]]
"""Takes a sequence's state and each array's value of one token, without the leading
axis; gives the output of the token and the state after it, both in float32."""


def check_state(state: Array, expected: tuple[int, int, int]) -> None:
    """Raises ValueError unless it is float32 and ends in the expected axes."""
    if state.ndim != 4 or state.shape[1:] != expected or state.dtype != jnp.float32:
        axes = ", ".join(map(str, expected))
        raise ValueError(
            f"state is {state.dtype}{state.shape}, expected float32 [S, {axes}]"
        )


def check_row_starts(row_starts: Array, state: Array) -> None:
    """Raises ValueError unless each state has its run of tokens."""
    if state.shape[0] != row_starts.shape[0] - 1:
        raise ValueError(
            f"state has {state.shape[0]} rows, row_starts {row_starts.shape[0] - 1}"
        )


def check_rows(rows: Array, num_tokens: int) -> None:
    """Raises ValueError unless each token has a row."""
    if rows.shape != (num_tokens,):
        raise ValueError(
            f"rows has shape {rows.shape}, but there are {num_tokens} tokens"
        )


def scan_tokens(
    advance: Advance,
    tokens: tuple[Array, ...],
    state: Float[Array, "S H N M"],
    row_starts: Int[Array, " S+1"],
    dtype: Any,
) -> tuple[Array, Float[Array, "S H N M"]]:
    """Advances packed sequences token after token; padding gives zeros.

    Args:
        advance: What one token does.
        tokens: Arrays over the packed tokens.
        state: State of each sequence.
        row_starts: First token of each sequence, then their number.
        dtype: Type of the outputs.

    Returns:
        The outputs of all tokens, and the states after the last ones.
    """
    rows = rows_of_tokens(row_starts, tokens[0].shape[0])

    def one_token(states: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        row, *values = token
        out, new = advance(states.at[row].get(mode="clip"), *values)
        out = jnp.where(row < states.shape[0], out, 0)
        return states.at[row].set(new, mode="drop"), out.astype(dtype)

    states, out = jax.lax.scan(one_token, state, (rows, *tokens))
    return out, states


def step_tokens(
    advance: Advance,
    tokens: tuple[Array, ...],
    state: Float[Array, "R H N M"],
    rows: Int[Array, " T"],
    dtype: Any,
) -> tuple[Array, Float[Array, "R H N M"]]:
    """Advances one token of each of some rows: gathers, advances and scatters.

    Args:
        advance: What one token does.
        tokens: Arrays over the tokens.
        state: State of each row.
        rows: Row of each token; one outside of the state gives zeros.
        dtype: Type of the outputs.

    Returns:
        The outputs, and the states with those of the rows replaced.
    """
    num_rows = state.shape[0]
    is_live = (rows >= 0) & (rows < num_rows)
    old = state.at[rows].get(mode="clip")
    out, new = jax.vmap(advance)(old, *tokens)
    out = jnp.where(is_live[:, None, None], out, 0).astype(dtype)
    targets = jnp.where(is_live, rows, num_rows)
    return out, state.at[targets].set(new, mode="drop")
