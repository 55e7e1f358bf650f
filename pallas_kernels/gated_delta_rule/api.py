"""The public operations: contract, checks, choice of implementation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.common.dispatch import Implementation, Operation
from pallas_kernels.common.recurrent import check_row_starts, check_rows, check_state
from pallas_kernels.common.target import Target

RULE = Operation("gated_delta_rule", "gated_delta_rule")
STEP = Operation("gated_delta_step", "gated_delta_rule")
OPERATION = RULE

NORM_EPSILON = 1e-6


class DeltaInputs(NamedTuple):
    """What a layer computes from each token.

    Attributes:
        q: Queries, one for each of K groups of heads.
        k: Keys, likewise.
        v: Values, head by head.
        g: Logarithm of the decay, at most zero.
        beta: How much of the old value a key replaces, usually between 0 and 1.
    """

    q: Float[Array, "T K Dk"]
    k: Float[Array, "T K Dk"]
    v: Float[Array, "T H Dv"]
    g: Float[Array, "T H"]
    beta: Float[Array, "T H"]


def gated_delta_rule(
    inputs: DeltaInputs,
    state: Float[Array, "S H Dk Dv"],
    row_starts: Int[Array, " S+1"],
    *,
    scale: float | None = None,
    normalise: bool = False,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> tuple[Float[Array, "T H Dv"], Float[Array, "S H Dk Dv"]]:
    """Runs packed sequences of tokens through a gated delta net's state.

    For each token and head, with h // (H / K) the group of head h:
    state = exp(g) state; state = state + k (beta (v - state^T k))^T;
    out = scale state^T q. Sequence i owns tokens row_starts[i] ... row_starts[i+1] - 1.
    State and sums are float32; 16-bit inputs are multiplied as such.

    Args:
        inputs: Of all tokens. Those from row_starts[S] on are padding and give zeros.
        state: State of each sequence before its first token here, float32.
        row_starts: First token of each sequence, in order; the last entry is the
            number of tokens that are no padding.
        scale: Factor on the queries; None for Dk ** -0.5.
        normalise: Whether queries and keys are divided by their length first.
        implementation: "reference" runs token by token and is differentiable; "auto"
            is the best one for the target.
        target: Device to compile for; None for the default one.

    Returns:
        The outputs in the type of v, and the states after the last tokens; a sequence
        without tokens keeps its own.

    Raises:
        ValueError: Shapes or types do not fit together.
        NotImplementedError: A forced implementation cannot do this.

    Source: Gated delta networks, arXiv:2412.06464 section 3; the chunked form with
    the WY representation is that of DeltaNet, arXiv:2406.06484.
    """
    _check(inputs, state)
    check_row_starts(row_starts, state)
    arguments = _prepared(inputs, scale, normalise=normalise)
    return RULE.run(implementation, target, *arguments, state, row_starts)


def gated_delta_step(
    inputs: DeltaInputs,
    state: Float[Array, "R H Dk Dv"],
    rows: Int[Array, " T"],
    *,
    scale: float | None = None,
    normalise: bool = False,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> tuple[Float[Array, "T H Dv"], Float[Array, "R H Dk Dv"]]:
    """Runs one token of each of T rows through a gated delta net.

    Args:
        inputs: Of the tokens; see `gated_delta_rule`.
        state: State of each row, float32; updated in place when it is donated.
        rows: Row of each token, all distinct; a token whose row is not in 0 ... R - 1
            gives zeros and changes nothing.
        scale: See `gated_delta_rule`, as for the following.
        normalise: See there.
        implementation: See there.
        target: See there.

    Returns:
        The outputs in the type of v, and the states; those of other rows are as they
        were.

    Raises:
        ValueError: Shapes or types do not fit together.
        NotImplementedError: A forced implementation cannot do this.
    """
    _check(inputs, state)
    check_rows(rows, inputs.v.shape[0])
    arguments = _prepared(inputs, scale, normalise=normalise)
    return STEP.run(implementation, target, *arguments, state, rows)


def _prepared(
    inputs: DeltaInputs, scale: float | None, *, normalise: bool
) -> tuple[Array, ...]:
    """Queries and keys as they are multiplied; gates in float32."""
    q, k, v, g, beta = inputs
    wide_q, wide_k = q.astype(jnp.float32), k.astype(jnp.float32)
    if normalise:
        wide_q, wide_k = _unit(wide_q), _unit(wide_k)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return (
        (wide_q * factor).astype(q.dtype),
        wide_k.astype(k.dtype),
        v,
        g.astype(jnp.float32),
        beta.astype(jnp.float32),
    )


def _unit(vectors: Float[Array, "T K D"]) -> Float[Array, "T K D"]:
    squares = jnp.sum(vectors * vectors, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(squares + NORM_EPSILON)


def _check(inputs: DeltaInputs, state: Array) -> None:
    q, k, v, g, beta = inputs
    tokens, heads, width = v.shape
    if q.shape != k.shape or q.shape[0] != tokens:
        raise ValueError(f"q {q.shape} and k {k.shape} do not fit v {v.shape}")
    if heads % q.shape[1]:
        raise ValueError(f"v has {heads} heads, no multiple of the {q.shape[1]} of k")
    if q.dtype != v.dtype or k.dtype != v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; must be the same")
    for name, gate in (("g", g), ("beta", beta)):
        if gate.shape != (tokens, heads):
            raise ValueError(f"{name} has shape {gate.shape}, not {(tokens, heads)}")
    check_state(state, (heads, q.shape[2], width))
