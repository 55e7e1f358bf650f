"""Writing new keys and values into the pool, and copying blocks within it."""

from pallas_kernels.kv_write.api import copy_blocks, kv_write

__all__ = ["copy_blocks", "kv_write"]
