"""The public operation: contract, checks, choice of implementation."""

from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.attention import Implementation, check_attention_arguments
from pallas_kernels.paged_attention.blocked import paged_attention_blocked
from pallas_kernels.paged_attention.reference import paged_attention_reference


def paged_attention(
    q: Float[Array, "S H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    lengths: Int[Array, " S"],
    *,
    scale: float,
    implementation: Implementation = "auto",
) -> Float[Array, "S H D"]:
    """Attends the newest token of each sequence to all its cached tokens.

    Computes softmax(q k^T * scale) v with scores and sums in float32, whatever the
    input type. The cache already holds the newest token's key and value.

    Args:
        q: Query heads of one token per sequence.
        kv: Pool of blocks: key | value, KV head, place in block, head width; of
            uint16 if it holds the bits of 16-bit queries' type.
        block_tables: Pool block of each run of P positions; entries past the length
            are ignored, ids outside the pool never read outside it.
        lengths: Tokens of each sequence in the cache; zero gives a row of zeros.
        scale: Factor on the scores, usually D ** -0.5.
        implementation: "reference" gathers the whole table and is differentiable;
            "blocked" works in proportion to the live tokens; "auto" is "blocked".

    Raises:
        ValueError: H is no multiple of K, or shapes do not fit together.

    Source: PagedAttention, arXiv:2309.06180 section 4.
    """
    check_attention_arguments(q, kv, block_tables, implementation)
    if implementation == "reference":
        return paged_attention_reference(q, kv, block_tables, lengths, scale)
    return paged_attention_blocked(q, kv, block_tables, lengths, scale)
