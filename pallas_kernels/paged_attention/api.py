"""The public operation: contract, checks, choice of implementation."""

from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.attention import check_attention_arguments, check_lengths
from pallas_kernels.common.dispatch import Implementation, Operation
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target

OPERATION = Operation(
    "paged_attention",
    "paged_attention",
    cpu=("blocked", "reference"),
    gpu=("gpu_triton", "gpu_mosaic", "blocked"),
    tpu=("tpu", "blocked"),
)


def paged_attention(
    q: Float[Array, "S H D"] | Float[Array, "S Q H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    *,
    kv_scales: Float[Array, "2 K"] | None = None,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> Float[Array, "S H D"] | Float[Array, "S Q H D"]:
    """Attends the newest tokens of each sequence to all its cached tokens.

    Scores and sums are float32, whatever the input type. The cache already holds the
    newest tokens' keys and values. Of Q tokens of a sequence (drafts to be verified),
    token i stands at position length - Q + i and does not see the ones after it.

    Args:
        q: Query heads of one token per sequence, or of Q.
        kv: Pool of blocks: key | value, KV head, place in block, head width. Of
            uint16 if it holds the bits of 16-bit queries' type.
        block_tables: Pool block of each run of P positions; entries past the length
            are ignored, ids outside the pool never read outside it.
        lengths: Tokens of each sequence in the cache; zero gives zeros, as does a
            token before position 0.
        options: How scores become weights.
        kv_scales: Factors on the keys and values of each head, for a quantized cache.
        implementation: "reference" gathers whole tables and is differentiable;
            "blocked" works in proportion to the live tokens; "auto" is the best one
            for the target.
        target: Device to compile for; None for the default one.

    Raises:
        ValueError: H is no multiple of K, shapes do not fit together, or an option is
            out of bounds.
        NotImplementedError: A forced implementation cannot do this.

    Source: PagedAttention, arXiv:2309.06180 section 4; split keys as in
    Flash-Decoding, https://pytorch.org/blog/flash-decoding.
    """
    check_attention_arguments(q, kv, block_tables, kv_scales)
    check_lengths(lengths, block_tables)
    if q.shape[0] != lengths.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows, lengths {lengths.shape[0]}")
    options.check(q.shape[-2])
    several = q if q.ndim == 4 else q[:, None]
    out = OPERATION.run(
        implementation, target, several, kv, block_tables, lengths, options, kv_scales
    )
    return out if q.ndim == 4 else out[:, 0]
