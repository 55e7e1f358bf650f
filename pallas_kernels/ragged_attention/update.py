"""Prefill attention that also stores the new tokens: one kernel."""

from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.attention import check_attention_arguments, check_lengths
from pallas_kernels.common.dispatch import Implementation, Operation
from pallas_kernels.common.kv_update import NewTokens, check_new_tokens
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.ragged_attention.tiles import TokenRuns

OPERATION = Operation(
    "ragged_attention_update",
    "ragged_attention",
    cpu=("reference",),
    gpu=("reference",),
    tpu=("tpu", "reference"),
)


def ragged_attention_update(
    tokens: NewTokens,
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    runs: TokenRuns,
    options: ScoreOptions,
    *,
    kv_scales: Float[Array, "2 K"] | None = None,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> tuple[Float[Array, "T H D"], Shaped[Array, "B 2 K P D"]]:
    """Stores runs of new tokens, then attends as `ragged_attention`.

    The tokens' places follow from the tables and runs: the last token of sequence i
    goes to position runs.lengths[i] - 1. A token before position 0, behind its table
    or in a block that the pool does not have is not stored, nor is padding. No two
    sequences may store into one block.

    Args:
        tokens: Queries `[T, H, D]`, keys and values `[T, K, D]`, sequence after
            sequence, then padding.
        kv: Pool of blocks; updated in place when it is donated and not used again.
        block_tables: As in `ragged_attention`.
        runs: As there.
        options: How scores become weights.
        kv_scales: Factors on the keys and values of each head, for a quantized cache:
            what is stored is divided by them, rounded to nearest and kept in range.
        implementation: "tpu" writes and reads in one kernel; "reference" scatters, then
            attends; differentiable.
        target: Device to compile for; None for the default one.

    Returns:
        The output, as that of `ragged_attention`, and the pool.

    Raises:
        ValueError: Shapes or types do not fit together, or an option is out of bounds.
        NotImplementedError: A forced implementation cannot do this.

    Source: Ragged Paged Attention v3, https://github.com/vllm-project/tpu-inference.
    """
    check_attention_arguments(tokens.q, kv, block_tables, kv_scales)
    check_new_tokens(tokens, kv)
    options.check(tokens.q.shape[-2])
    check_lengths(runs.lengths, block_tables)
    runs.check()
    return OPERATION.run(
        implementation,
        target,
        tokens,
        kv,
        block_tables,
        runs.starts,
        runs.lengths,
        options,
        kv_scales,
        tiles=runs.tiles,
    )
