"""The public operations: contract, checks, choice of implementation."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.common.dispatch import Implementation, Operation
from pallas_kernels.common.recurrent import check_row_starts, check_rows, check_state
from pallas_kernels.common.target import Target

SCAN = Operation("ssm_scan", "ssm_scan")
STEP = Operation("ssm_step", "ssm_scan")
OPERATION = SCAN


class SsmInputs(NamedTuple):
    """What a layer computes from each token.

    Attributes:
        x: Values, head by head.
        dt: Step sizes, before bias and softplus where the parameters ask for these.
        B: Where a value enters the state, one for each of G groups of heads.
        C: How the state is read, likewise.
    """

    x: Float[Array, "T H P"]
    dt: Float[Array, "T H"]
    B: Float[Array, "T G N"]
    C: Float[Array, "T G N"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["A", "D", "dt_bias"],
    meta_fields=["softplus"],
)
@dataclasses.dataclass(frozen=True, slots=True)
class SsmParameters:
    """What a layer has learnt.

    Attributes:
        A: Rate of each head, negative: minus the exponential of a checkpoint's A_log.
        D: Factor on the value that goes straight to the output; None for none.
        dt_bias: Added to the step sizes; None for none.
        softplus: Whether step sizes are softplus(dt + dt_bias).
    """

    A: Float[Array, " H"]
    D: Float[Array, " H"] | None = None
    dt_bias: Float[Array, " H"] | None = None
    softplus: bool = True


def ssm_scan(
    inputs: SsmInputs,
    parameters: SsmParameters,
    state: Float[Array, "S H P N"],
    row_starts: Int[Array, " S+1"],
    *,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> tuple[Float[Array, "T H P"], Float[Array, "S H P N"]]:
    """Runs packed sequences of tokens through a Mamba-2 layer's state.

    For each token and head, with d the step size and h // (H / G) the group of head h:
    state = exp(d A) state + d x B^T; y = state C + D x. Sequence i owns tokens
    row_starts[i] ... row_starts[i+1] - 1. State and sums are float32; 16-bit inputs
    are multiplied as such. The gate z and the norm after it are the caller's.

    Args:
        inputs: Of all tokens. Those from row_starts[S] on are padding and give zeros.
        parameters: Of the layer.
        state: State of each sequence before its first token here, float32.
        row_starts: First token of each sequence, in order; the last entry is the
            number of tokens that are no padding.
        implementation: "reference" runs token by token and is differentiable; "auto"
            is the best one for the target.
        target: Device to compile for; None for the default one.

    Returns:
        y in the type of x, and the states after the last tokens; a sequence without
        tokens keeps its own.

    Raises:
        ValueError: Shapes or types do not fit together.
        NotImplementedError: A forced implementation cannot do this.

    Source: Mamba-2, arXiv:2405.21060 section 6 (the chunked algorithm).
    """
    _check(inputs, parameters, state)
    check_row_starts(row_starts, state)
    arguments = _arguments(inputs, parameters)
    return SCAN.run(implementation, target, *arguments, state, row_starts)


def ssm_step(
    inputs: SsmInputs,
    parameters: SsmParameters,
    state: Float[Array, "R H P N"],
    rows: Int[Array, " T"],
    *,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> tuple[Float[Array, "T H P"], Float[Array, "R H P N"]]:
    """Runs one token of each of T rows through a Mamba-2 layer; see `ssm_scan`.

    Args:
        inputs: Of the tokens.
        parameters: Of the layer.
        state: State of each row, float32; updated in place when it is donated.
        rows: Row of each token, all distinct; a token whose row is not in 0 ... R - 1
            gives zeros and changes nothing.
        implementation: See `ssm_scan`.
        target: See `ssm_scan`.

    Returns:
        y in the type of x, and the states; those of other rows are as they were.

    Raises:
        ValueError: Shapes or types do not fit together.
        NotImplementedError: A forced implementation cannot do this.
    """
    _check(inputs, parameters, state)
    check_rows(rows, inputs.x.shape[0])
    arguments = _arguments(inputs, parameters)
    return STEP.run(implementation, target, *arguments, state, rows)


def _arguments(inputs: SsmInputs, parameters: SsmParameters) -> tuple[Array, ...]:
    """x, final step sizes, A, B, C and D; vectors and step sizes in float32."""
    dt = inputs.dt.astype(jnp.float32)
    if parameters.dt_bias is not None:
        dt = dt + parameters.dt_bias.astype(jnp.float32)[None, :]
    if parameters.softplus:
        dt = jax.nn.softplus(dt)
    a = parameters.A.astype(jnp.float32)
    d = parameters.D
    d = jnp.zeros_like(a) if d is None else d.astype(jnp.float32)
    return inputs.x, dt, a, inputs.B, inputs.C, d


def _check(inputs: SsmInputs, parameters: SsmParameters, state: Array) -> None:
    x, dt, b, c = inputs
    tokens, heads, width = x.shape
    if dt.shape != (tokens, heads):
        raise ValueError(f"dt has shape {dt.shape}, expected {(tokens, heads)}")
    if b.shape != c.shape or b.shape[0] != tokens:
        raise ValueError(f"B {b.shape} and C {c.shape} do not fit x {x.shape}")
    if heads % b.shape[1]:
        raise ValueError(f"x has {heads} heads, no multiple of {b.shape[1]} groups")
    if b.dtype != x.dtype or c.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}, B {b.dtype}, C {c.dtype}; must be the same")
    check_state(state, (heads, width, b.shape[2]))
    for name in ("A", "D", "dt_bias"):
        array = getattr(parameters, name)
        if array is not None and array.shape != (heads,):
            raise ValueError(f"{name} has shape {array.shape}, expected ({heads},)")
