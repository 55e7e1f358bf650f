"""Real shapes of prefill attention that stores the new tokens."""

from typing import Any

from jax import Array

from pallas_kernels.common.attention_cases import case_options, real_case
from pallas_kernels.common.cases import AttentionCase, KernelCase
from pallas_kernels.common.kv_update import NewTokens
from pallas_kernels.common.update_cases import make_update_case
from pallas_kernels.ragged_attention.tiles import TokenRuns
from pallas_kernels.ragged_attention.update import ragged_attention_update


def update_cases() -> list[KernelCase]:
    """Prompts and mixtures with the heads of Llama 3 8B, every type of cache."""
    rows, new = (2048, 4096), 1024
    cases = (
        real_case("2k", (2048,), 2048),
        real_case("8k", (8192,), 8192),
        real_case(
            "mixed",
            (2048, 9000, 700, *(4096,) * 29),
            (1024, 512, 475, *(1,) * 29),
        ),
        *(
            real_case(f"bfloat16_over_{dtype}", rows, new, kv_dtype=dtype)
            for dtype in ("float8_e4m3fn", "float8_e5m2", "int8")
        ),
        real_case("float32", rows, new, dtype="float32"),
        real_case(
            "float16_over_bfloat16", rows, new, dtype="float16", kv_dtype="bfloat16"
        ),
        real_case("no_groups", rows, new, num_kv_heads=32),
        real_case("one_kv_head", rows, new, num_heads=8, num_kv_heads=1, head_dim=256),
        real_case("groups_of_7", rows, new, num_heads=28, num_kv_heads=4),
        real_case("window_sinks", rows, new, window=128, has_sinks=True),
        real_case("soft_cap_alibi", rows, new, soft_cap=50.0, has_alibi=True),
    )
    return [make_update_case("ragged_attention_update", _call, case) for case in cases]


def _call(
    case: AttentionCase,
    tokens: NewTokens,
    kv: Array,
    block_tables: Array,
    row_starts: Array,
    lengths: Array,
    *extra: Array,
    **choice: Any,
) -> tuple[Array, Array]:
    options, scales = case_options(case, extra)
    return ragged_attention_update(
        tokens,
        kv,
        block_tables,
        TokenRuns(row_starts, lengths),
        options,
        kv_scales=scales,
        **choice,
    )
