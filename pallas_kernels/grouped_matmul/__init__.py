"""Matrix products of rows sorted by expert, each with the matrix of its expert."""

from pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
