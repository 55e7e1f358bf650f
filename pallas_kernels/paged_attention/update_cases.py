"""Real shapes of decode attention that stores the new tokens."""

from typing import Any

from jax import Array

from pallas_kernels.common.attention_cases import case_options, real_case
from pallas_kernels.common.cases import AttentionCase, KernelCase
from pallas_kernels.common.kv_update import NewTokens
from pallas_kernels.common.update_cases import make_update_case
from pallas_kernels.paged_attention.update import paged_attention_update


def update_cases() -> list[KernelCase]:
    """Decode and verification with the heads of Llama 3 8B, every type of cache."""
    rows = (4096,) * 8
    cases = (
        real_case("32_rows_8k", (8192,) * 32, 1),
        real_case("ragged", (65536, *(512,) * 31), 1),
        real_case("256_rows_1k", (1024,) * 256, 1),
        real_case("verify_4", (8192,) * 8, 4),
        *(
            real_case(f"bfloat16_over_{dtype}", rows, 1, kv_dtype=dtype)
            for dtype in ("float8_e4m3fn", "float8_e5m2", "int8")
        ),
        real_case("float32", rows, 1, dtype="float32"),
        real_case(
            "float16_over_bfloat16", rows, 1, dtype="float16", kv_dtype="bfloat16"
        ),
        real_case("no_groups", rows, 1, num_kv_heads=32),
        real_case("one_kv_head", rows, 1, num_heads=8, num_kv_heads=1, head_dim=256),
        real_case("groups_of_7", rows, 1, num_heads=28, num_kv_heads=4),
        real_case("window_sinks", rows, 1, window=128, has_sinks=True),
        real_case("soft_cap_alibi", rows, 1, soft_cap=50.0, has_alibi=True),
    )
    return [make_update_case("paged_attention_update", _call, case) for case in cases]


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
    """Calls the operation; all rows have the same number of new tokens."""
    del row_starts
    options, scales = case_options(case, extra)
    num_rows = len(case.lengths)
    several = NewTokens(*(x.reshape(num_rows, -1, *x.shape[1:]) for x in tokens))
    out, kv = paged_attention_update(
        several, kv, block_tables, lengths, options, kv_scales=scales, **choice
    )
    return out.reshape(tokens.q.shape), kv
