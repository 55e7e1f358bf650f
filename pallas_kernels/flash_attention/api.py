"""The public operation: contract, checks, choice of implementation."""

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.common.dispatch import Implementation, Operation
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target

OPERATION = Operation(
    "flash_attention",
    "flash_attention",
    cpu=("blocked", "reference"),
    gpu=("gpu_triton", "gpu_mosaic", "blocked"),
    tpu=("tpu", "blocked"),
)


def flash_attention(
    q: Float[Array, "N T H D"],
    k: Float[Array, "N S K D"],
    v: Float[Array, "N S K D"],
    options: ScoreOptions,
    *,
    causal: bool = True,
    q_segment_ids: Int[Array, "N T"] | None = None,
    kv_segment_ids: Int[Array, "N S"] | None = None,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> Float[Array, "N T H D"]:
    """Attends dense queries to dense keys; differentiable in all its float arrays.

    Scores and sums are float32, whatever the input type. A causal query at row t
    stands at position t + S - T, else at t. Without `causal` the options work on both
    sides: a window shows the keys at |i - j| < window, and ALiBi adds
    -slope * |i - j|. A query that sees no key gives zeros. Except for the reference no
    implementation keeps a `[T, S]` matrix, the backward pass included.

    Args:
        q: Queries; H must be a multiple of K.
        k: Keys.
        v: Values.
        options: How scores become weights; its arrays have gradients, too.
        causal: Whether a query sees no key after its own position.
        q_segment_ids: A query sees only the keys of the same id; None for all keys.
            Tiles of ids that cannot meet are skipped: sorted ids are the fastest.
        kv_segment_ids: Ids of the keys; needed with those of the queries.
        implementation: "auto" is the best one for the target.
        target: Device to compile for; None for the default one.

    Raises:
        ValueError: H is no multiple of K, shapes or types do not fit together, only
            one of the segment ids is given, or an option is out of bounds.
        NotImplementedError: A forced implementation cannot do this.

    Source: FlashAttention-2, arXiv:2307.08691; FlashAttention-3, arXiv:2407.08608.
    """
    _check(q, k, v, q_segment_ids, kv_segment_ids)
    options.check(q.shape[2])
    return OPERATION.run(
        implementation,
        target,
        q,
        k,
        v,
        options,
        causal,
        q_segment_ids,
        kv_segment_ids,
    )


def _check(
    q: Array,
    k: Array,
    v: Array,
    q_segment_ids: Array | None,
    kv_segment_ids: Array | None,
) -> None:
    """Raises ValueError naming the argument when shapes or types do not fit."""
    if q.ndim != 4:
        raise ValueError(f"q has shape {q.shape}, expected [N, T, H, D]")
    if k.ndim != 4 or (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(
            f"k has shape {k.shape}, expected [{q.shape[0]}, S, K, {q.shape[3]}]"
        )
    if v.shape != k.shape:
        raise ValueError(f"v has shape {v.shape}, k has {k.shape}")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q is {q.dtype}, k is {k.dtype}, v is {v.dtype}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q {q.shape} and k {k.shape} must not be empty")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads, no multiple of the {k.shape[2]} KV heads"
        )
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("q_segment_ids and kv_segment_ids must be given together")
    for name, ids, like in (
        ("q_segment_ids", q_segment_ids, q),
        ("kv_segment_ids", kv_segment_ids, k),
    ):
        if ids is not None and ids.shape != like.shape[:2]:
            raise ValueError(f"{name} has shape {ids.shape}, expected {like.shape[:2]}")
