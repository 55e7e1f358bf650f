"""Products with weights stored as the checkpoint has them, outputs first."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

TILE_ELEMENTS = 1 << 20
"""Weights that the CPU widens at once for a single row: 4 MB of float32 stay in its
caches, and fewer would not be shared among its cores."""


def linear(
    x: Float[Array, "*batch K"],
    weight: Float[Array, "*out K"],
    bias: Float[Array, "*out"] | None = None,
) -> Float[Array, "..."]:
    """Contracts the last axis of both; float32 sums, result in the type of `x`.

    The weight keeps its checkpoint orientation, so that nothing is transposed at load,
    and the product asks for float32 output, without which XLA's CPU backend is many
    times slower for bfloat16.
    """
    out = linear_float32(x, weight)
    if bias is not None:
        out = out + jnp.broadcast_to(bias.astype(jnp.float32), out.shape)
    return out.astype(x.dtype)


def linear_float32(
    x: Float[Array, "*batch K"], weight: Float[Array, "*out K"]
) -> Float[Array, "..."]:
    """The same product, left in float32; for logits."""
    # A weight of two dimensions is used as it lies; of more, XLA would transpose it.
    flat = weight.reshape(-1, weight.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1 and rows.dtype.itemsize == 2:
        out = jax.lax.platform_dependent(
            rows, flat, cpu=_product_of_one_row, default=_product
        )
    else:
        out = _product(rows, flat)
    return out.reshape(*x.shape[:-1], *weight.shape[:-1])


def _product(x: Float[Array, "N K"], weight: Float[Array, "M K"]) -> Array:
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)


def _product_of_one_row(x: Float[Array, "1 K"], weight: Float[Array, "M K"]) -> Array:
    """What a CPU does with a single 16-bit row, which XLA has no product for."""
    num_tiles = round(weight.size / TILE_ELEMENTS)
    if x.dtype == jnp.bfloat16 and num_tiles > 1:
        return _product_by_tiles(x, weight, num_tiles)
    # XLA would convert the whole weight; for two rows it does not.
    return _product(jnp.concatenate([x, x]), weight)[:1]


def _product_by_tiles(
    x: Float[Array, "1 K"], weight: Float[Array, "M K"], num_tiles: int
) -> Array:
    """Widens a bfloat16 weight tile by tile, each multiplied while still in cache.

    So memory is read at half the bytes of a float32 weight. At least two tiles: XLA
    unrolls a loop of one.
    """
    num_outputs = weight.shape[0]
    tile = -(-num_outputs // num_tiles)
    wide = x.astype(jnp.float32)

    def add_tile(index: Array, out: Array) -> Array:
        # The barrier keeps the integer view of the weight inside the loop: outside it
        # would be a copy. The bits are shifted as integers, which XLA vectorises.
        held, place = jax.lax.optimization_barrier((weight, index * tile))
        bits = jax.lax.bitcast_convert_type(held, jnp.uint16)
        # Slice and update clamp alike: the last tile may repeat rows of the one before.
        part = jax.lax.dynamic_slice_in_dim(bits, place, tile)
        part = jnp.left_shift(part.astype(jnp.uint32), jnp.uint32(16))
        part = jax.lax.bitcast_convert_type(part, jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(out, _product(wide, part), place, 1)

    out = jnp.zeros((1, num_outputs), jnp.float32)
    return jax.lax.fori_loop(0, num_tiles, add_tile, out)
