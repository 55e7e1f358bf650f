"""The public operations: contracts, checks, choice of implementation."""

from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.dispatch import Implementation, Operation
from pallas_kernels.common.target import Target
from pallas_kernels.kv_write.heads import HeadNorms, Heads, Rotation

KV_WRITE = Operation("kv_write", "kv_write")
QKV_WRITE = Operation("qkv_write", "kv_write")
COPY_BLOCKS = Operation("copy_blocks", "kv_write")


def kv_write(
    kv: Shaped[Array, "B 2 K P D"],
    keys: Float[Array, "T K D"],
    values: Float[Array, "T K D"],
    slots: Int[Array, " T"],
    *,
    kv_scales: Float[Array, "2 K"] | None = None,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> Shaped[Array, "B 2 K P D"]:
    """Writes the keys and values of new tokens into their slots, in place.

    Args:
        kv: Pool of blocks; updated in place when it is donated and not used again.
            A pool of uint16 holds the bits of 16-bit floats: XLA's CPU backend widens
            all operands of a 16-bit float scatter, hence the whole pool.
        keys: Keys of the new tokens, cast to the type of the pool.
        values: Their values.
        slots: block * P + place, all distinct; one outside the pool is not written.
        kv_scales: Factors on the keys and values of each head, for a pool of int8 or
            float8: what is stored is the quotient in float32, rounded to nearest (ties
            to even), and the largest value of the type where it lies beyond.
        implementation: "auto" is the best one for the target.
        target: Device to compile for; None for the default one.

    Raises:
        ValueError: Shapes or types do not fit together.
        NotImplementedError: A forced implementation cannot do this.
    """
    if keys.shape[1:] != (kv.shape[2], kv.shape[4]):
        raise ValueError(f"keys {keys.shape} do not fit the pool {kv.shape}")
    _check(kv, keys, values, slots, kv_scales)
    return KV_WRITE.run(implementation, target, kv, keys, values, slots, kv_scales)


def qkv_write(
    heads: Heads,
    kv: Shaped[Array, "B 2 K P W"],
    slots: Int[Array, " T"],
    rotation: Rotation,
    *,
    norms: HeadNorms | None = None,
    kv_scales: Float[Array, "2 K"] | None = None,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> tuple[Float[Array, "T H W"], Shaped[Array, "B 2 K P W"]]:
    """Normalises and rotates queries and keys, and writes keys and values in place.

    Norms and rotation are computed in float32. As in Llama's code, the result is
    rounded to the type of the heads after the normalisation, after the product with the
    norm's weight (only there with a weight offset), and after the rotation.

    Args:
        heads: Queries, keys and values as projected.
        kv: Pool of blocks, as for `kv_write`; its heads may be wider than the model's,
            what is beyond becomes zero.
        slots: See `kv_write`.
        rotation: Cosines and sines of each token.
        norms: Norms of each head; None for none.
        kv_scales: See `kv_write`.
        implementation: "auto" is the best one for the target.
        target: Device to compile for; None for the default one.

    Returns:
        The rotated queries, as wide as the pool's heads, and the pool.

    Raises:
        ValueError: Shapes or types do not fit together.
        NotImplementedError: A forced implementation cannot do this.

    Source: RoFormer, arXiv:2104.09864; norms of heads, arXiv:2302.05442.
    """
    q, keys, values = heads
    width, half = keys.shape[2], rotation.cos.shape[-1]
    if keys.shape[1] != kv.shape[2] or width > kv.shape[4]:
        raise ValueError(f"keys {keys.shape} do not fit the pool {kv.shape}")
    if q.shape[::2] != keys.shape[::2]:
        raise ValueError(f"q {q.shape} does not fit the keys {keys.shape}")
    if rotation.cos.shape != (len(slots), half) or 2 * half > width:
        raise ValueError(
            f"rotation.cos has shape {rotation.cos.shape}, expected ({len(slots)}, F) "
            f"with F of at most {width // 2}"
        )
    if rotation.sin.shape != rotation.cos.shape:
        raise ValueError(
            f"rotation.sin has shape {rotation.sin.shape}, rotation.cos "
            f"{rotation.cos.shape}"
        )
    if norms is not None:
        for name, weight in (("q", norms.q), ("keys", norms.keys)):
            if weight.shape != (width,):
                raise ValueError(
                    f"norms.{name} has shape {weight.shape}, expected ({width},)"
                )
        if norms.weight_offset not in (0, 1):
            raise ValueError(
                f"norms.weight_offset={norms.weight_offset} must be 0 or 1"
            )
    _check(kv, keys, values, slots, kv_scales)
    return QKV_WRITE.run(
        implementation, target, heads, kv, slots, rotation, norms, kv_scales
    )


def copy_blocks(
    pool: Shaped[Array, "B ..."],
    sources: Int[Array, " C"],
    targets: Int[Array, " C"],
    *,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> Shaped[Array, "B ..."]:
    """Copies whole blocks within a pool, in place.

    Args:
        pool: Any array whose first axis is the block.
        sources: Blocks to read; none of them may be a target.
        targets: Blocks to write, all distinct; one outside the pool is not written.
        implementation: "auto" is the best one for the target.
        target: Device to compile for; None for the default one.

    Raises:
        ValueError: There are not as many sources as targets.
        NotImplementedError: A forced implementation cannot do this.
    """
    if sources.shape != targets.shape:
        raise ValueError(f"sources {sources.shape} and targets {targets.shape} differ")
    return COPY_BLOCKS.run(implementation, target, pool, sources, targets)


def _check(
    kv: Array, keys: Array, values: Array, slots: Array, kv_scales: Array | None
) -> None:
    if keys.shape != values.shape:
        raise ValueError(f"keys {keys.shape} and values {values.shape} differ")
    if slots.shape != keys.shape[:1]:
        raise ValueError(f"slots has shape {slots.shape}, expected ({keys.shape[0]},)")
    if kv.dtype == "uint16" and keys.dtype.itemsize != 2:
        raise ValueError(f"a pool of uint16 cannot hold the bits of {keys.dtype}")
    if (kv_scales is not None) != (kv.dtype.itemsize == 1):
        wanted = "needs" if kv_scales is None else "takes no"
        raise ValueError(f"kv of {kv.dtype} {wanted} kv_scales")
    if kv_scales is not None and kv_scales.shape != (2, kv.shape[2]):
        raise ValueError(
            f"kv_scales has shape {kv_scales.shape}, expected (2, {kv.shape[2]})"
        )
