"""Named shapes of decode attention, for tests and benchmarks."""

from pallas_kernels.common.cases import AttentionCase

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
)
