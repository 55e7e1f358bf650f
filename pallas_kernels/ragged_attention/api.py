"""The public operation: contract, checks, choice of implementation."""

from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.attention import Implementation, check_attention_arguments
from pallas_kernels.ragged_attention.blocked import ragged_attention_blocked
from pallas_kernels.ragged_attention.reference import ragged_attention_reference


def ragged_attention(
    q: Float[Array, "T H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    row_starts: Int[Array, " S+1"],
    lengths: Int[Array, " S"],
    *,
    scale: float,
    implementation: Implementation = "auto",
) -> Float[Array, "T H D"]:
    """Attends the newest tokens of each sequence to its cached tokens, causally.

    The tokens `row_starts[s] : row_starts[s + 1]` of `q` are the last ones of sequence
    `s`; each sees the keys up to its own position. Scores and sums are in float32,
    whatever the input type. The cache already holds the new keys and values.

    Args:
        q: Query heads, sequence after sequence.
        kv: Pool of blocks: key | value, KV head, place in block, head width; of
            uint16 if it holds the bits of 16-bit queries' type.
        block_tables: Pool block of each run of P positions; entries past the length
            are ignored, ids outside the pool never read outside it.
        row_starts: First token of each sequence; its last entry counts the tokens.
            Tokens past it are padding and come out as zero.
        lengths: Tokens of each sequence in the cache, the new ones included.
        scale: Factor on the scores, usually D ** -0.5.
        implementation: "reference" gathers whole tables and is differentiable;
            "blocked" works in proportion to the live tokens; "auto" is "blocked".

    Raises:
        ValueError: H is no multiple of K, or shapes do not fit together.

    Source: PagedAttention, arXiv:2309.06180 section 4; FlashAttention-2,
    arXiv:2307.08691.
    """
    check_attention_arguments(q, kv, block_tables, implementation)
    if row_starts.shape != (block_tables.shape[0] + 1,):
        raise ValueError(
            f"row_starts has shape {row_starts.shape}, expected one more than the "
            f"{block_tables.shape[0]} rows of block_tables"
        )
    if implementation == "reference":
        return ragged_attention_reference(
            q, kv, block_tables, row_starts, lengths, scale
        )
    return ragged_attention_blocked(q, kv, block_tables, row_starts, lengths, scale)
