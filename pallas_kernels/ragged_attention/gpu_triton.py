"""Prefill attention in Pallas on Triton: tiles of tokens over the paged cache.

A program attends a run of tokens of one sequence, for the query heads of one KV head,
to all the keys they see. Which run is read off a table of tiles, so that any mixture
of prompts, chunks and single tokens fits one grid.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.common.triton_attention import (
    AttentionTiles,
    KeyRun,
    QueryTile,
    Refs,
    attend_keys,
    check_supported,
    compiler_params,
    divide_up,
    first_visible,
    gather_operands,
    plan_tiles,
    power_of_two,
    scale_values,
)
from pallas_kernels.common.tuning import Sizes, tuned_sizes
from pallas_kernels.ragged_attention.tiles import TileLayout, TileTable, tiles_for

MAX_GROUP = 256


class TableRefs(NamedTuple):
    """Which tokens each tile holds; see `tiles.TileTable`."""

    packed: Any  # [3 N + 1]
    row_starts: Any  # [S + 1]

    @property
    def num_used(self) -> Any:
        """Number of used tiles."""
        return self.packed[0]

    def read(self, tile: Any) -> tuple[Any, Any, Any]:
        """Row, first token and number of tokens of a tile."""
        size = self.packed.shape[0] // 3
        row, first_token, num_tokens = (
            self.packed[1 + column * size + tile] for column in range(3)
        )
        return row, first_token, num_tokens


def ragged_attention_gpu_triton(
    q: Float[Array, "T H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    row_starts: Int[Array, " S+1"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    kv_scales: Float[Array, "2 K"] | None,
    *,
    tiles: TileTable | None = None,
    target: Target,
) -> Float[Array, "T H D"]:
    """Attends tile after tile of tokens; see `api.ragged_attention`.

    Source: FlashAttention-2, arXiv:2307.08691.
    """
    check_supported(q, kv, target)
    num_tokens, num_heads, _ = q.shape
    num_kv_heads = kv.shape[2]
    group = num_heads // num_kv_heads
    if group > MAX_GROUP:
        raise NotImplementedError(
            f"{group} query heads per KV head are above {MAX_GROUP} on Triton"
        )
    sizes, layout = _sizes(q, kv, target), tile_layout(q, kv, target)
    plan = plan_tiles(
        q,
        kv,
        block_tables,
        options,
        tokens=layout.tile_q(num_tokens),
        block_n=sizes["block_n"],
        target=target,
    )
    starts = row_starts.astype(jnp.int32)
    table = tiles_for(tiles, starts, num_tokens, layout)
    operands = gather_operands(q, kv, block_tables, lengths, options, kv_scales)
    # A wgmma instruction of Hopper takes four warps and 64 rows.
    num_warps = 8 if plan.rows >= 128 else 4
    return pl.pallas_call(
        functools.partial(_tile_kernel, tiles=plan),
        # Heads first, and the last tiles, which see most keys, before the others.
        grid=(num_kv_heads, table.size),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=compiler_params(num_warps, sizes["num_stages"]),
        interpret=target.interpret,
        name="ragged_attention",
    )(*operands, *TableRefs(table.packed, starts))


def tile_layout(q: Any, kv: Any, target: Target) -> TileLayout:
    """How tokens are cut; see `api.tile_layout`."""
    group = q.shape[1] // kv.shape[2]
    return TileLayout(tokens=max(1, _sizes(q, kv, target)["tile_rows"] // group))


def _sizes(q: Any, kv: Any, target: Target) -> Sizes:
    key = f"gpu_triton_{q.dtype}_{kv.dtype}_{q.shape[2]}"
    defaults = default_sizes(q, kv, target)
    return tuned_sizes("ragged_attention", target, key, defaults)


def default_sizes(q: Any, kv: Any, target: Target) -> dict[str, int]:
    """Sizes of tiles: what fits the registers and the shared memory."""
    width = power_of_two(kv.shape[4])
    itemsize = max(q.dtype.itemsize, kv.dtype.itemsize)
    is_small = width <= 128 and itemsize == 2
    # Queries, two or three buffers of keys and values; 99, 163 or 227 KiB in all.
    kib_per_tile = 32 if itemsize == 2 else 16
    if target.generation in ("sm_86", "sm_89", "sm_120"):
        kib_per_tile = 16
    elif is_small and target.generation.startswith(("sm_9", "sm_10")):
        kib_per_tile = 64
    tile_rows = 128 if is_small else 64
    if itemsize == 4:
        tile_rows = 32 if width <= 128 else 16
    return {
        "tile_rows": tile_rows,
        "block_n": min(128, max(16, kib_per_tile * 1024 // (2 * width * itemsize))),
        "num_stages": 3 if kib_per_tile == 64 else 5,
    }


def _tile_kernel(*all_refs: Any, tiles: AttentionTiles) -> None:
    refs = Refs(*all_refs[: len(Refs._fields)])
    table = TableRefs(*all_refs[len(Refs._fields) : -1])
    out_ref = all_refs[-1]
    head = pl.program_id(0)
    number = pl.num_programs(1) - 1 - pl.program_id(1)
    row, first_token, num_tokens = table.read(number)

    @pl.when(num_tokens > 0)
    def _attend() -> None:
        length = tiles.load_length(refs, row)
        # The last of the row's tokens stands at its last position.
        first_position = first_token + length - table.row_starts[row + 1]
        tile = QueryTile(row, head, first_token, num_tokens, first_position)
        begin = first_visible(tiles.window, first_position)
        keys = KeyRun(begin, first_position + num_tokens)
        add_tiles = attend_keys(tiles, refs, tile, keys)
        state = tiles.start()
        first_full, end_full, end = _split_keys(tiles, tile, begin)
        if tiles.window is not None:
            state = add_tiles(state, np.int32(0), first_full, is_masked=True)
        state = add_tiles(state, first_full, end_full, is_masked=False)
        state = add_tiles(state, end_full, end, is_masked=True)
        state = state._replace(weighted=scale_values(refs, tile, state.weighted))
        sinks = None
        if refs.sinks is not None:
            sinks = tiles.load_heads(refs.sinks, head)
        tiles.store_rows(out_ref, tile, tiles.finish(state, sinks))

    # Unused tiles are as many as the tokens of padding need.
    unused = number - table.num_used
    padding = table.row_starts[table.row_starts.shape[0] - 1] + unused * tiles.tokens
    total_tokens = out_ref.shape[0]

    @pl.when((unused >= 0) & (padding < total_tokens))
    def _store_zeros() -> None:
        count = jnp.minimum(total_tokens - padding, tiles.tokens)
        tile = QueryTile(head, head, padding, count, padding)
        zeros = jnp.zeros((tiles.rows, tiles.width), jnp.float32)
        tiles.store_rows(out_ref, tile, zeros)


def _split_keys(
    tiles: AttentionTiles, tile: QueryTile, begin: Array
) -> tuple[Array, Array, Array]:
    """Tiles of keys: the first that all queries see whole, the next, and the end.

    The tiles before reach past the window of some query, those after past the position
    of some query.
    """
    last_position = tile.first_position + tile.num_tokens - 1
    end = divide_up(jnp.maximum(last_position + 1 - begin, 0), tiles.block_n)
    num_common = jnp.maximum(tile.first_position + 1 - begin, 0)
    end_full = lax.div(num_common, np.int32(tiles.block_n))
    if tiles.window is None:
        return jnp.zeros_like(end), end_full, end
    first = first_visible(tiles.window, last_position) - begin
    first_full = jnp.minimum(divide_up(jnp.maximum(first, 0), tiles.block_n), end)
    return first_full, jnp.maximum(first_full, end_full), end
