"""The public operation: contract, checks, choice of implementation."""

import importlib

import jax
from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.attention import check_attention_arguments, check_lengths
from pallas_kernels.common.dispatch import Implementation, Operation
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.ragged_attention.tiles import TileLayout, TokenRuns

OPERATION = Operation(
    "ragged_attention",
    "ragged_attention",
    cpu=("blocked", "reference"),
    gpu=("gpu_triton", "gpu_mosaic", "blocked"),
    tpu=("tpu", "blocked"),
)


def ragged_attention(
    q: Float[Array, "T H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    runs: TokenRuns,
    options: ScoreOptions,
    *,
    kv_scales: Float[Array, "2 K"] | None = None,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> Float[Array, "T H D"]:
    """Attends runs of new tokens to the cached tokens of their sequences, causally.

    The runs are chunks of prompts over a cached prefix and single tokens, in any mix.
    The cache already holds the new keys and values. Scores and sums are float32,
    whatever the input type.

    Args:
        q: Query heads of the tokens, sequence after sequence. Tokens from
            runs.starts[S] on are padding and give zeros.
        kv: Pool of blocks: key | value, KV head, place in block, head width. Of
            uint16 if it holds the bits of 16-bit queries' type.
        block_tables: Pool block of each run of P positions of a sequence; entries past
            the length are ignored, ids outside the pool never read outside it.
        runs: Which tokens are whose, and where they stand.
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

    Source: FlashAttention-2, arXiv:2307.08691; ragged batches as in Ragged Paged
    Attention, https://github.com/vllm-project/tpu-inference.
    """
    check_attention_arguments(q, kv, block_tables, kv_scales)
    options.check(q.shape[-2])
    check_lengths(runs.lengths, block_tables)
    runs.check()
    return OPERATION.run(
        implementation,
        target,
        q,
        kv,
        block_tables,
        runs.starts,
        runs.lengths,
        options,
        kv_scales,
        tiles=runs.tiles,
    )


def tile_layout(
    q: jax.ShapeDtypeStruct,
    kv: jax.ShapeDtypeStruct,
    *,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> TileLayout | None:
    """Tells how `ragged_attention` wants the tokens cut, for any number of them.

    Args:
        q: Shape `[T, H, D]` and type of the queries on one device, with any `T`.
        kv: Shape `[B, 2, K, P, D]` and type of the pool on one device, with any `B`.
        implementation: As `ragged_attention` will be called.
        target: As `ragged_attention` will be called.

    Returns:
        What `make_tiles` takes; None where no table is read. Of several possible
        implementations it is that of the first: another one cuts anew.
    """
    chosen, target = OPERATION.first_choice(implementation, target)
    if chosen == "reference":
        return None
    module = importlib.import_module(f"pallas_kernels.ragged_attention.{chosen}")
    return module.tile_layout(q, kv, target)
