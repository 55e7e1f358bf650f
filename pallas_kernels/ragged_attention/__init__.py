"""Attention of runs of new tokens over a paged cache."""

from pallas_kernels.common.kv_update import NewTokens
from pallas_kernels.ragged_attention.api import ragged_attention, tile_layout
from pallas_kernels.ragged_attention.reference import (
    attend_by_weights,
    ragged_attention_weights,
)
from pallas_kernels.ragged_attention.tiles import (
    TileLayout,
    TileTable,
    TokenRuns,
    make_tiles,
)
from pallas_kernels.ragged_attention.update import ragged_attention_update

__all__ = [
    "NewTokens",
    "TileLayout",
    "TileTable",
    "TokenRuns",
    "attend_by_weights",
    "make_tiles",
    "ragged_attention",
    "ragged_attention_update",
    "ragged_attention_weights",
    "tile_layout",
]
