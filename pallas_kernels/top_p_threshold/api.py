"""The public operation: contract, checks, choice of implementation."""

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.common.dispatch import Implementation, Operation
from pallas_kernels.common.target import Target

OPERATION = Operation(
    "top_p_threshold", "top_p_threshold", cpu=("blocked", "reference")
)


def top_p_threshold(
    scores: Float[Array, "S V"],
    top_k: Int[Array, " S"],
    top_p: Float[Array, " S"],
    temperature: Float[Array, " S"],
    *,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> Float[Array, " S"]:
    """Finds the lowest score of each row that top-k, then top-p keeps.

    Of a row, top-k keeps the scores from the largest threshold on at which at least
    `top_k` scores are kept: the best ones and all that equal the last of them. Of
    these, top-p keeps those from the largest threshold on at which the sum of their
    weights is at least `top_p` times the sum of the weights of all that top-k keeps.
    A weight is exp((score - best) / temperature). Weights and sums are float32, each
    implementation with an order of summation of its own that does not depend on the
    other rows; so thresholds differ only where the sum meets its bound to within
    rounding. The best score is always kept.

    Args:
        scores: Any numbers; banned tokens are minus infinity.
        top_k: Scores to keep; 0 or less, or V or more, keeps all.
        top_p: Share of the probability to keep; 1 or more keeps all.
        temperature: Positive divisor of the scores.
        implementation: "blocked" looks only into the blocks of a row with the largest
            scores where that suffices; "auto" is the best one for the target.
        target: Device to compile for; None for the default one.

    Returns:
        The thresholds: minus infinity where everything is kept, and in rows that hold
        a NaN or plus infinity, or nothing but minus infinity.

    Raises:
        ValueError: Shapes do not fit together, or the scores are not float32.
        NotImplementedError: A forced implementation cannot do this.

    Source: The Curious Case of Neural Text Degeneration, arXiv:1904.09751.
    """
    if scores.dtype != "float32":
        raise ValueError(f"scores of {scores.dtype} must be float32")
    for name, array in (
        ("top_k", top_k),
        ("top_p", top_p),
        ("temperature", temperature),
    ):
        if array.shape != scores.shape[:1]:
            raise ValueError(
                f"{name} has shape {array.shape}, expected ({scores.shape[0]},)"
            )
    return OPERATION.run(implementation, target, scores, top_k, top_p, temperature)
