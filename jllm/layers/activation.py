"""Activation functions of feed-forward layers, by one name each."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import jax
from jax import Array
from jaxtyping import Float

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
"""Sources: GELU and its approximation by tanh, arXiv:1606.08415; SiLU, there too."""

_FUNCTIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def activate(x: Float[Array, "*batch F"], name: Activation) -> Float[Array, "*batch F"]:
    """Applies the function in float32; the result has the type of `x`."""
    return _FUNCTIONS[name](x.astype("float32")).astype(x.dtype)
