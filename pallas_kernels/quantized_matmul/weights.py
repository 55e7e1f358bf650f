"""Weights as a checkpoint stores them, and activations quantised to match."""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Shaped

Scheme = Literal["plain", "int8", "float8", "int4"]

PACK_BLOCK = 256  # weights of a row whose halves share bytes
FLOAT8_TYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2)
# The zero point of int4 weights that come without one.
MIDDLE_ZERO = 8


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales", "zeros", "order"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix of N output channels and K inputs; the type of `values` is its scheme.

    - plain: values `[N, K]` of a float type, nothing else.
    - int8, float8 (e4m3fn, e5m2): values `[N, K]`, scales `[N]`;
      w[n, k] = values[n, k] * scales[n].
    - int4: uint8 values `[N, 128 * ceil(K / 256)]`, two weights per byte, scales
      `[N, G]` for groups of K / G neighbouring inputs, zeros `[N, G]` of uint8 or None
      for 8; w[n, k] = (q[n, k] - zeros[n, g]) * scales[n, g]. Byte 128 b + i of a row
      holds the weight 256 b + i in its low half and 256 b + 128 + i in its high half,
      so that each half of a run of bytes is a run of weights.

    Fields may also hold shapes or shardings in place of arrays, as in any pytree.

    Attributes:
        values: The stored weights.
        scales: Factors of float32, bfloat16 or float16; None for plain ones.
        zeros: Zero points of int4 weights, at most 128.
        order: int32 `[K]`: weight k belongs to the input x[:, order[k]] (GPTQ with
            `desc_act`); None for their own order.
    """

    values: Any
    scales: Any = None
    zeros: Any = None
    order: Any = None

    @property
    def scheme(self) -> Scheme:
        """How the values stand for weights."""
        dtype = jnp.dtype(self.values.dtype)
        if dtype == jnp.uint8:
            return "int4"
        if dtype == jnp.int8:
            return "int8"
        return "float8" if dtype in FLOAT8_TYPES else "plain"

    @property
    def num_channels(self) -> int:
        """Output channels N."""
        return self.values.shape[0]

    def check(self, num_inputs: int) -> None:
        """Raises ValueError naming the part that does not fit K inputs."""
        scheme, num_channels = self.scheme, self.num_channels
        if scheme == "plain" and not jnp.issubdtype(self.values.dtype, jnp.floating):
            raise ValueError(
                f"weight.values of {self.values.dtype} must be of a float type, int8, "
                "or uint8 for two int4 per byte"
            )
        width = num_inputs
        if scheme == "int4":
            width = -(-num_inputs // PACK_BLOCK) * PACK_BLOCK // 2
        _expect("weight.values", self.values, (num_channels, width))
        if self.order is not None:
            _expect("weight.order", self.order, (num_inputs,))
        if scheme == "int4":
            self._check_groups(num_inputs)
        elif scheme == "plain":
            if self.scales is not None:
                raise ValueError("weight.scales must be None for plain weights")
        elif self.scales is None:
            raise ValueError(f"weight.scales must be given for {scheme} weights")
        else:
            _expect("weight.scales", self.scales, (num_channels,))
        if scheme != "int4" and self.zeros is not None:
            raise ValueError(f"weight.zeros must be None for {scheme} weights")

    def _check_groups(self, num_inputs: int) -> None:
        if self.scales is None or self.scales.ndim != 2:
            raise ValueError("weight.scales must be [N, G] for int4 weights")
        groups = self.scales.shape[1]
        if groups < 1 or num_inputs % groups:
            raise ValueError(
                f"weight.scales has {groups} groups, which do not divide the "
                f"{num_inputs} inputs"
            )
        _expect("weight.scales", self.scales, (self.num_channels, groups))
        if self.zeros is not None:
            _expect("weight.zeros", self.zeros, (self.num_channels, groups))


def _expect(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if tuple(array.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {shape}")


def quantize_per_token(
    x: Float[Array, "M K"], dtype: DTypeLike
) -> tuple[Shaped[Array, "M K"], Float[Array, " M"]]:
    """Rounds each row to int8 or float8 with a float32 scale of its own.

    The largest magnitude of a row becomes the largest value of the type; a row of
    zeros has the scale 1. x is nearly values * scales[:, None].

    Raises:
        ValueError: The type is neither int8, float8_e4m3fn nor float8_e5m2.
    """
    dtype = jnp.dtype(dtype)
    is_int8 = dtype == jnp.int8
    if not is_int8 and dtype not in FLOAT8_TYPES:
        raise ValueError(f"dtype={dtype} must be int8, float8_e4m3fn or float8_e5m2")
    limit = 127.0 if is_int8 else float(jnp.finfo(dtype).max)
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=1)
    scales = jnp.where(largest > 0, largest / limit, 1.0)
    scaled = jnp.clip(wide / scales[:, None], -limit, limit)
    values = jnp.round(scaled) if is_int8 else scaled
    return values.astype(dtype), scales
