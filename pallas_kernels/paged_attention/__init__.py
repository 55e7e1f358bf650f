"""Attention of a few new tokens per sequence over a paged cache."""

from pallas_kernels.common.kv_update import NewTokens
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.update import paged_attention_update

__all__ = ["NewTokens", "paged_attention", "paged_attention_update"]
