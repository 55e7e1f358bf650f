"""Writing new keys and values into the pool, and copying blocks within it."""

from pallas_kernels.kv_write.api import copy_blocks, kv_write, qkv_write
from pallas_kernels.kv_write.heads import (
    HeadNorms,
    Heads,
    Rotation,
    rotate_and_widen,
)

__all__ = [
    "HeadNorms",
    "Heads",
    "Rotation",
    "copy_blocks",
    "kv_write",
    "qkv_write",
    "rotate_and_widen",
]
