"""Named shapes of prefill attention, for tests and benchmarks."""

from pallas_kernels.common.cases import AttentionCase

CASES = (
    AttentionCase("one_prompt", (37,), (37,)),
    AttentionCase("one_token_prompt", (1,), (1,)),
    AttentionCase("tile_and_one", (33,), (33,)),
    AttentionCase("chunk_after_prefix", (300,), (70,)),
    AttentionCase("mixed", (1, 16, 17, 130, 300, 0), (1, 16, 1, 65, 33, 0)),
    AttentionCase("no_groups", (33, 64), (33, 3), num_heads=4, num_kv_heads=4),
    AttentionCase("narrow", (20, 5), (7, 5), head_dim=8, block_size=4),
    AttentionCase("wide", (40, 9), (40, 2), num_heads=4, head_dim=256),
    AttentionCase("width_80", (40, 9), (11, 9), head_dim=80),
    AttentionCase("width_96", (40, 9), (11, 9), head_dim=96),
    AttentionCase("width_128", (40, 9), (11, 9), head_dim=128, block_size=128),
    AttentionCase("bfloat16", (60, 200), (60, 30), dtype="bfloat16"),
    AttentionCase("float16", (60, 200), (60, 30), dtype="float16"),
)
