"""What the engine and the models may know of the kernels: the choice, not the calls."""

from pallas_kernels.common.dispatch import (
    Fallback,
    Implementation,
    collect_fallbacks,
)
from pallas_kernels.common.target import Target
from pallas_kernels.ragged_attention import TileLayout, TileTable, make_tiles

__all__ = [
    "Fallback",
    "Implementation",
    "Target",
    "TileLayout",
    "TileTable",
    "collect_fallbacks",
    "make_tiles",
]
