"""Decode attention that also stores the new tokens: one pass over the pool."""

from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.attention import check_attention_arguments, check_lengths
from pallas_kernels.common.dispatch import Implementation, Operation
from pallas_kernels.common.kv_update import NewTokens, check_new_tokens
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target

OPERATION = Operation(
    "paged_attention_update",
    "paged_attention",
    cpu=("reference",),
    gpu=("reference",),
    tpu=("tpu", "reference"),
)


def paged_attention_update(
    tokens: NewTokens,
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    *,
    kv_scales: Float[Array, "2 K"] | None = None,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> tuple[Float[Array, "S H D"] | Float[Array, "S Q H D"], Shaped[Array, "B 2 K P D"]]:
    """Stores the newest tokens of each sequence, then attends as `paged_attention`.

    The tokens' places follow from the tables and lengths: of Q tokens of a sequence,
    token i goes to position length - Q + i. A token before position 0, behind its
    table or in a block that the pool does not have is not stored. No two sequences may
    store into one block, nor one read what another stores.

    Args:
        tokens: Queries, keys and values: `[S, H, D]` and `[S, K, D]`, or with Q tokens
            to a sequence `[S, Q, H, D]` and `[S, Q, K, D]`.
        kv: Pool of blocks; updated in place when it is donated and not used again.
        block_tables: As in `paged_attention`.
        lengths: Tokens of each sequence, the new ones included; zero for none.
        options: How scores become weights.
        kv_scales: Factors on the keys and values of each head, for a quantized cache:
            what is stored is divided by them, rounded to nearest and kept in range.
        implementation: "tpu" puts the tokens into the blocks that it reads anyway, and
            writes those back; "reference" scatters, then attends; differentiable.
        target: Device to compile for; None for the default one.

    Returns:
        The output, as that of `paged_attention`, and the pool.

    Raises:
        ValueError: Shapes or types do not fit together, or an option is out of bounds.
        NotImplementedError: A forced implementation cannot do this.

    Source: Ragged Paged Attention v3, https://github.com/vllm-project/tpu-inference.
    """
    check_attention_arguments(tokens.q, kv, block_tables, kv_scales)
    check_lengths(lengths, block_tables)
    if tokens.q.shape[0] != lengths.shape[0]:
        raise ValueError(
            f"tokens.q has {tokens.q.shape[0]} rows, lengths {lengths.shape[0]}"
        )
    check_new_tokens(tokens, kv)
    options.check(tokens.q.shape[-2])
    is_single = tokens.q.ndim == 3
    several = NewTokens(*(x[:, None] for x in tokens)) if is_single else tokens
    out, kv = OPERATION.run(
        implementation, target, several, kv, block_tables, lengths, options, kv_scales
    )
    return (out[:, 0] if is_single else out), kv
