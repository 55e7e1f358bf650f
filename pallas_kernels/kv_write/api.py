"""The public operations: contracts and checks."""

from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.kv_write.reference import copy_blocks_reference, kv_write_reference


def kv_write(
    kv: Shaped[Array, "B 2 K P D"],
    keys: Float[Array, "T K D"],
    values: Float[Array, "T K D"],
    slots: Int[Array, " T"],
) -> Shaped[Array, "B 2 K P D"]:
    """Writes the keys and values of new tokens into their slots, in place.

    Args:
        kv: Pool of blocks; updated in place when it is donated and not used again.
            A pool of uint16 holds the bits of 16-bit floats: XLA's CPU backend widens
            all operands of a 16-bit float scatter, hence the whole pool.
        keys: Keys of the new tokens, cast to the type of the pool.
        values: Their values.
        slots: block * P + place, all distinct; one outside the pool is not written.

    Raises:
        ValueError: Shapes do not fit together.
    """
    if keys.shape != values.shape:
        raise ValueError(f"keys {keys.shape} and values {values.shape} differ")
    if keys.shape[1:] != (kv.shape[2], kv.shape[4]):
        raise ValueError(f"keys {keys.shape} do not fit the pool {kv.shape}")
    if kv.dtype == "uint16" and keys.dtype.itemsize != 2:
        raise ValueError(f"a pool of uint16 cannot hold the bits of {keys.dtype}")
    return kv_write_reference(kv, keys, values, slots)


def copy_blocks(
    pool: Shaped[Array, "B ..."],
    sources: Int[Array, " C"],
    targets: Int[Array, " C"],
) -> Shaped[Array, "B ..."]:
    """Copies whole blocks within a pool, in place.

    Args:
        pool: Any array whose first axis is the block.
        sources: Blocks to read; none of them may be a target.
        targets: Blocks to write, all distinct; one outside the pool is not written.
    """
    if sources.shape != targets.shape:
        raise ValueError(f"sources {sources.shape} and targets {targets.shape} differ")
    return copy_blocks_reference(pool, sources, targets)
