"""Attention of prompt chunks and single tokens in any mix over a paged cache."""

from pallas_kernels.ragged_attention.api import ragged_attention

__all__ = ["ragged_attention"]
