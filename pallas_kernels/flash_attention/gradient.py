"""Makes an implementation differentiable: the parts that are the same for all."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.flash_attention.rules import Arrays, Rules


class Saved(NamedTuple):
    """What the backward pass knows of the forward pass.

    Attributes:
        lse: Logarithm of each query's sum of exponentials, float32.
        delta: Product of each output with its cotangent, float32.
        d_out: Cotangent of the output.
    """

    lse: Float[Array, "N H T"]
    delta: Float[Array, "N H T"]
    d_out: Float[Array, "N T H D"]


class Gradients(NamedTuple):
    """Cotangents of the arrays; of the slopes where there are some."""

    q: Float[Array, "N T H D"]
    k: Float[Array, "N S K D"]
    v: Float[Array, "N S K D"]
    slopes: Float[Array, " H"] | None


Forward = Callable[[Arrays, Rules], tuple[Array, Array]]
Backward = Callable[[Arrays, Rules, Saved], Gradients]


def attend(
    forward: Forward, backward: Backward, arrays: Arrays, rules: Rules
) -> Float[Array, "N T H D"]:
    """Attends with kernels that recompute the weights in the backward pass.

    Args:
        forward: Gives the output and each query's log-sum-exp `[N, H, T]`.
        backward: Gives the cotangents.
        arrays: The inputs.
        rules: What is static.
    """

    @jax.custom_vjp
    def run(arrays: Arrays) -> Array:
        return forward(arrays, rules)[0]

    def save(arrays: Arrays) -> tuple[Array, tuple[Arrays, Array, Array]]:
        out, lse = forward(arrays, rules)
        return out, (arrays, out, lse)

    def differentiate(
        residuals: tuple[Arrays, Array, Array], d_out: Array
    ) -> tuple[Arrays]:
        arrays, out, lse = residuals
        terms = out.astype(jnp.float32) * d_out.astype(jnp.float32)
        delta = terms.sum(axis=-1).swapaxes(1, 2)
        gradients = backward(arrays, rules, Saved(lse, delta, d_out))
        sinks, slopes = arrays.sinks, gradients.slopes
        if sinks is not None:
            shares = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse)
            sinks = -(shares * delta).sum(axis=(0, 2)).astype(sinks.dtype)
        if arrays.slopes is not None and slopes is not None:
            slopes = slopes.astype(arrays.slopes.dtype)
        # No cotangent for the ids: they are integers.
        return (Arrays(*gradients[:3], sinks, slopes, None, None),)

    run.defvjp(save, differentiate)
    return run(arrays)
