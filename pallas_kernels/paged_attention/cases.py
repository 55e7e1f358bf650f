"""Named shapes of decode attention, for tests and benchmarks."""

from typing import Any

from jax import Array

from pallas_kernels.common.attention_cases import (
    case_options,
    for_each_platform,
    real_case,
    variants,
)
from pallas_kernels.common.cases import AttentionCase, KernelCase
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.update_cases import update_cases

CASES = (
    AttentionCase("one_row", (37,), (1,)),
    AttentionCase("ragged", (1, 15, 16, 17, 300, 0), (1, 1, 1, 1, 1, 0)),
    AttentionCase("no_groups", (33, 64), (1, 1), num_heads=4, num_kv_heads=4),
    AttentionCase("one_kv_head", (33, 64), (1, 1), num_heads=6, num_kv_heads=1),
    AttentionCase("narrow", (20, 5), (1, 1), head_dim=8, block_size=4),
    AttentionCase("wide", (40, 9), (1, 1), num_heads=4, head_dim=256),
    AttentionCase("width_80", (40, 9), (1, 1), head_dim=80),
    AttentionCase("width_96", (40, 9), (1, 1), head_dim=96),
    AttentionCase("width_128", (40, 9), (1, 1), head_dim=128, block_size=128),
    AttentionCase("bfloat16", (60, 200), (1, 1), dtype="bfloat16"),
    AttentionCase("float16", (60, 200), (1, 1), dtype="float16"),
    AttentionCase("fp8_e4m3", (60, 200), (1, 1), kv_dtype="float8_e4m3fn"),
    AttentionCase("fp8_e5m2", (60, 200), (1, 1), kv_dtype="float8_e5m2"),
    AttentionCase("int8", (60, 200), (1, 1), kv_dtype="int8"),
    AttentionCase("window", (5, 16, 17, 200), (1,) * 4, window=16),
    AttentionCase("window_of_one", (5, 200), (1, 1), window=1),
    AttentionCase("soft_cap", (60, 200), (1, 1), soft_cap=2.0),
    AttentionCase("sinks", (1, 200, 0), (1, 1, 0), has_sinks=True),
    AttentionCase("alibi", (60, 200), (1, 1), has_alibi=True),
    AttentionCase("shared_blocks", (70, 64, 100), (1, 1, 1), shared_blocks=3),
)

VERIFY_CASES = (
    AttentionCase("verify", (4, 33, 200), (4, 4, 4)),
    AttentionCase(
        "verify_with_everything",
        (5, 64, 130),
        (3, 3, 3),
        dtype="bfloat16",
        kv_dtype="int8",
        window=40,
        soft_cap=3.0,
        has_sinks=True,
        has_alibi=True,
    ),
)


def kernel_cases() -> list[KernelCase]:
    """Decode and verification with the heads of Llama 3 8B, and every variant."""
    cases = (
        real_case("32_rows_8k", (8192,) * 32, 1),
        real_case("1_row_8k", (8192,), 1),
        real_case("1_row_64k", (65536,), 1),
        real_case("ragged", (65536, *(512,) * 31), 1),
        real_case("256_rows_1k", (1024,) * 256, 1),
        real_case("verify_4", (8192,) * 8, 4),
        *variants((4096,) * 8, 1),
    )
    reading = for_each_platform("paged_attention", _call, cases)
    return [*reading, *update_cases()]


def _call(
    case: AttentionCase,
    q: Array,
    kv: Array,
    block_tables: Array,
    row_starts: Array,
    lengths: Array,
    *extra: Array,
    **choice: Any,
) -> Array:
    """Calls the operation; all rows have the same number of new tokens."""
    del row_starts
    options, scales = case_options(case, extra)
    tokens = q.reshape(len(case.lengths), -1, *q.shape[1:])
    queries = tokens[:, 0] if tokens.shape[1] == 1 else tokens
    out = paged_attention(
        queries, kv, block_tables, lengths, options, kv_scales=scales, **choice
    )
    return out.reshape(q.shape)
