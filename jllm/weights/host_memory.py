"""Memory for weights that a CPU computes with: in huge pages, and used as it lies."""

import math
import mmap
from typing import Any

import numpy as np

ALIGNMENT = 64
"""Bytes; XLA's CPU backend uses arrays aligned to this without a copy."""

HUGE_PAGE = 1 << 21
"""Bytes of a huge page on the common processors."""


class HostMemory:
    """A stretch of memory from which arrays are cut one after the other.

    Products read weights once per step, so fast that looking up pages of 4 kB is a
    tenth to a quarter of the time. The system is asked for huge pages, which it may
    refuse. The stretch is given back when the last of its arrays is gone.

    Args:
        capacity: Bytes of all arrays; more are allocated one by one.
    """

    def __init__(self, capacity: int) -> None:
        """Reserves addresses; memory is taken as the arrays are filled."""
        self._free = memoryview(b"")
        if capacity < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return
        stretch = mmap.mmap(-1, capacity + 2 * HUGE_PAGE)
        stretch.madvise(mmap.MADV_HUGEPAGE)
        address = np.frombuffer(stretch, np.uint8).ctypes.data
        self._free = memoryview(stretch)[-address % HUGE_PAGE :]

    def __bool__(self) -> bool:
        """Whether there is room for more."""
        return len(self._free) > 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An array of zeros or of anything."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._free) or not size:
            return np.empty(shape, dtype)
        array = np.frombuffer(self._free[:size], np.uint8).view(dtype).reshape(shape)
        self._free = self._free[-(-size // ALIGNMENT) * ALIGNMENT :]
        return array
