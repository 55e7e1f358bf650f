"""The public operation: contract, checks, choice of implementation."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.dispatch import Implementation, Operation
from pallas_kernels.common.target import Target

OPERATION = Operation("mla_attention", "mla_attention")


def mla_attention(
    q_latent: Float[Array, "T H R"],
    q_rope: Float[Array, "T H Dr"],
    latent: Shaped[Array, "B P W"],
    block_tables: Int[Array, "S M"],
    row_starts: Int[Array, " S+1"],
    lengths: Int[Array, " S"],
    scale: float | Float[Array, ""],
    *,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> Float[Array, "T H R"]:
    """Attends new tokens to the cached latents of their sequences, causally.

    All heads share one key per position, the latent followed by its rotary part, and
    its latent is the value too: the caller has multiplied queries by the keys'
    up-projection and multiplies the result by that of the values. Sequence i owns
    tokens row_starts[i] ... row_starts[i+1] - 1, which stand at its last positions, so
    that lengths[i] counts them too: decode with one token per sequence or several,
    chunks of prompts, or any mix. The cache already holds the new latents. Scores and
    sums are float32, whatever the input type.

    Args:
        q_latent: Queries absorbed into the latent space, sequence after sequence.
            Tokens from row_starts[S] on are padding and give zeros.
        q_rope: Their rotary parts.
        latent: Pool of blocks: block, place, latent then rotary part (W >= R + Dr; more
            is not read). One of 8-bit floats is read as it is: multiply `scale` and
            the result by its factor.
        block_tables: Pool block of each run of P positions of a sequence; entries past
            the length are ignored, ids outside the pool never read outside it.
        row_starts: First token of each sequence, in order; the last entry is the
            number of tokens that are no padding.
        lengths: Tokens of each sequence in the cache.
        scale: Factor on the products.
        implementation: "reference" gathers whole tables and is differentiable; "auto"
            is the best one for the target.
        target: Device to compile for; None for the default one.

    Raises:
        ValueError: Shapes do not fit together.
        NotImplementedError: A forced implementation cannot do this.

    Source: DeepSeek-V2, arXiv:2405.04434 section 2.1; split keys as in Flash-Decoding,
    https://pytorch.org/blog/flash-decoding.
    """
    if q_rope.shape[:2] != q_latent.shape[:2]:
        raise ValueError(
            f"q_rope {q_rope.shape} does not fit q_latent {q_latent.shape}"
        )
    if q_rope.dtype != q_latent.dtype:
        raise ValueError(f"q_rope is {q_rope.dtype}, q_latent {q_latent.dtype}")
    width = q_latent.shape[2] + q_rope.shape[2]
    if latent.ndim != 3 or latent.shape[2] < width:
        raise ValueError(
            f"latent has shape {latent.shape}, expected [B, P, {width} or more]"
        )
    rows = lengths.shape[0]
    if block_tables.ndim != 2 or block_tables.shape[0] != rows:
        raise ValueError(f"block_tables {block_tables.shape} for {rows} lengths")
    if row_starts.shape != (rows + 1,):
        raise ValueError(f"row_starts {row_starts.shape} for {rows} lengths")
    return OPERATION.run(
        implementation,
        target,
        q_latent,
        q_rope,
        latent,
        block_tables,
        row_starts,
        lengths,
        jnp.asarray(scale, jnp.float32),
    )
