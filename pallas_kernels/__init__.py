"""Kernels: arrays in, arrays out, local shards only; one folder per operation."""

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.gated_delta_rule import gated_delta_rule, gated_delta_step
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.kv_write import copy_blocks, kv_write, qkv_write
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.paged_attention import paged_attention, paged_attention_update
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.ragged_attention import ragged_attention, ragged_attention_update
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.silu_mul import silu_mul
from pallas_kernels.ssm_scan import ssm_scan, ssm_step
from pallas_kernels.top_p_threshold import top_p_threshold

__all__ = [
    "copy_blocks",
    "flash_attention",
    "gated_delta_rule",
    "gated_delta_step",
    "grouped_matmul",
    "kv_write",
    "mla_attention",
    "paged_attention",
    "paged_attention_update",
    "qkv_write",
    "quantized_matmul",
    "ragged_attention",
    "ragged_attention_update",
    "rms_norm",
    "silu_mul",
    "ssm_scan",
    "ssm_step",
    "top_p_threshold",
]
