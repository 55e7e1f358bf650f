"""Kernels: arrays in, arrays out, local shards only; one folder per operation."""

from pallas_kernels.kv_write import copy_blocks, kv_write
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.ragged_attention import ragged_attention

__all__ = ["copy_blocks", "kv_write", "paged_attention", "ragged_attention"]
