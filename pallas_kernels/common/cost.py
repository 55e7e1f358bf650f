"""What a kernel tells the TPU's compiler of its work, which cannot look into it.

Without it the compiler counts a kernel as less than nothing: its totals of a program
come out too small, even negative, and it cannot plan copies beside the kernel.
"""

from typing import Any

from jax.experimental import pallas as pl


def cost_of(
    *arrays: Any, flops: int, exponentials: int = 0, more_bytes: int = 0
) -> pl.CostEstimate:
    """Estimate of a kernel, as if every row and sequence were in use.

    Args:
        arrays: Arrays or shapes that are read or written once.
        flops: Two for each multiplication with addition.
        exponentials: Evaluations of exp and its like.
        more_bytes: Bytes moved beside the arrays.
    """
    moved = sum(array.size * array.dtype.itemsize for array in arrays)
    return pl.CostEstimate(
        flops=flops, transcendentals=exponentials, bytes_accessed=moved + more_bytes
    )
