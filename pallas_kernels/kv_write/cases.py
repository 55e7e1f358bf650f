"""Named shapes of cache writes: tokens, KV heads, head width, block size, type."""

CASES = (
    ("one_token", 1, 2, 64, 16, "float32"),
    ("chunk", 40, 4, 80, 16, "float32"),
    ("narrow", 9, 1, 8, 4, "float32"),
    ("wide", 12, 3, 128, 8, "float32"),
    ("bfloat16", 33, 2, 128, 16, "bfloat16"),
)
