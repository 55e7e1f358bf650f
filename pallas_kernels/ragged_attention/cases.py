"""Named shapes of prefill attention, for tests and benchmarks."""

from typing import Any

from jax import Array

from pallas_kernels.common.attention_cases import (
    case_options,
    for_each_platform,
    real_case,
    variants,
)
from pallas_kernels.common.cases import AttentionCase, KernelCase
from pallas_kernels.ragged_attention.api import ragged_attention
from pallas_kernels.ragged_attention.tiles import TokenRuns
from pallas_kernels.ragged_attention.update_cases import update_cases

CASES = (
    AttentionCase("one_prompt", (37,), (37,)),
    AttentionCase("one_token_prompt", (1,), (1,)),
    AttentionCase("tile_and_one", (33,), (33,)),
    AttentionCase("chunk_after_prefix", (300,), (70,)),
    AttentionCase("mixed", (1, 16, 17, 130, 300, 0), (1, 16, 1, 65, 33, 0)),
    AttentionCase("no_groups", (33, 64), (33, 3), num_heads=4, num_kv_heads=4),
    AttentionCase("one_kv_head", (33, 64), (33, 3), num_heads=6, num_kv_heads=1),
    AttentionCase("narrow", (20, 5), (7, 5), head_dim=8, block_size=4),
    AttentionCase("wide", (40, 9), (40, 2), num_heads=4, head_dim=256),
    AttentionCase("width_80", (40, 9), (11, 9), head_dim=80),
    AttentionCase("width_96", (40, 9), (11, 9), head_dim=96),
    AttentionCase("width_128", (40, 9), (11, 9), head_dim=128, block_size=128),
    AttentionCase("bfloat16", (60, 200), (60, 30), dtype="bfloat16"),
    AttentionCase("float16", (60, 200), (60, 30), dtype="float16"),
    AttentionCase("fp8_e4m3", (60, 200), (60, 30), kv_dtype="float8_e4m3fn"),
    AttentionCase("fp8_e5m2", (60, 200), (60, 30), kv_dtype="float8_e5m2"),
    AttentionCase("int8", (60, 200), (60, 30), kv_dtype="int8"),
    AttentionCase("window", (5, 16, 130, 200), (5, 1, 130, 30), window=16),
    AttentionCase("window_of_one", (5, 200), (5, 30), window=1),
    AttentionCase("soft_cap", (60, 200), (60, 30), soft_cap=2.0),
    AttentionCase("sinks", (1, 200, 0), (1, 30, 0), has_sinks=True),
    AttentionCase("alibi", (60, 200), (60, 30), has_alibi=True),
    AttentionCase(
        "everything",
        (5, 64, 130),
        (5, 1, 70),
        dtype="bfloat16",
        kv_dtype="int8",
        window=40,
        soft_cap=3.0,
        has_sinks=True,
        has_alibi=True,
    ),
    AttentionCase("shared_blocks", (70, 64, 100), (6, 1, 20), shared_blocks=3),
)


def kernel_cases() -> list[KernelCase]:
    """Prompts, chunks and mixtures with the heads of Llama 3 8B, and every variant."""
    cases = (
        real_case("2k", (2048,), 2048),
        real_case("8k", (8192,), 8192),
        real_case("chunk_after_prefix", (16384,), 2048),
        real_case(
            "mixed",
            (2048, 9000, 700, *(4096,) * 29),
            (1024, 512, 475, *(1,) * 29),
        ),
        *variants((2048, 4096), 1024),
    )
    reading = for_each_platform("ragged_attention", _call, cases)
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
    options, scales = case_options(case, extra)
    runs = TokenRuns(row_starts, lengths)
    return ragged_attention(
        q, kv, block_tables, runs, options, kv_scales=scales, **choice
    )
