"""Prefill attention for Hopper: TMA per block, wgmma, two computing warpgroups.

A thread block computes one tile of 128 rows, (token, query head of a KV head), half of
them in each computing warpgroup. The warpgroups take turns, one has the tensor cores
while the other computes its softmax.

Source: FlashAttention-3, arXiv:2407.08608 section 3.1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.mosaic_attention import (
    COMPUTE_REGISTERS,
    COPY_REGISTERS,
    LOG2_E,
    NUM_COMPUTE,
    ROWS,
    MosaicTiles,
    Queries,
    Ring,
    Run,
    Turns,
    as_columns,
    as_units,
    attend,
    check_supported,
    compiler_params,
    copy_keys,
    normalised,
    values_per_row,
)
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes
from pallas_kernels.ragged_attention.tiles import TileLayout, TileTable, tiles_for

FOLDER = "ragged_attention"
TILE_ROWS = ROWS * NUM_COMPUTE


def default_sizes(head_dim: int) -> dict[str, int]:
    """Sizes that leave accumulators in registers and fill the shared memory."""
    return {64: {"block_n": 128, "num_stages": 4}}.get(
        head_dim, {"block_n": 16384 // head_dim, "num_stages": 2}
    )


def ragged_attention_gpu_mosaic(
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
    """Attends runs of new tokens, causally; see `api.ragged_attention`."""
    check_supported(q, kv, kv_scales, options, target)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv.shape[2]
    group = num_heads // num_kv_heads
    if group > TILE_ROWS:
        raise NotImplementedError(f"{group} query heads per KV head, above {TILE_ROWS}")
    if 0 in q.shape or 0 in block_tables.shape:
        return jnp.zeros_like(q)
    key = f"mosaic_{q.dtype}_{head_dim}"
    sizes = tuned_sizes(FOLDER, target, key, default_sizes(head_dim))
    layout = tile_layout(q, kv, target)
    plan = MosaicTiles.of(q, kv, options, sizes, tokens=layout.tokens, target=target)
    row_starts, lengths = row_starts.astype(jnp.int32), lengths.astype(jnp.int32)
    table = tiles_for(tiles, row_starts, num_tokens, layout)
    out = attend_tiles(
        pack(q, table, plan),
        as_units(kv, plan),
        block_tables.astype(jnp.int32),
        describe_tiles(table, row_starts, lengths, plan),
        [
            values_per_row(values, num_kv_heads, TILE_ROWS).reshape(
                -1, NUM_COMPUTE, ROWS
            )
            for values in (options.sinks, options.alibi_slopes)
            if values is not None
        ],
        plan,
        Given(options.sinks is not None, options.alibi_slopes is not None),
        target,
    )
    return unpack(out, row_starts, num_tokens, plan).reshape(q.shape)


def tile_layout(q: Any, kv: Any, target: Target) -> TileLayout:
    """How tokens are cut; see `api.tile_layout`."""
    del target
    group = q.shape[1] // kv.shape[2]
    return TileLayout(tokens=max(1, TILE_ROWS // group))


class Given(NamedTuple):
    """Which options the caller has given."""

    sinks: bool
    slopes: bool


def pack(
    q: Float[Array, "T H D"], table: TileTable, tiles: MosaicTiles
) -> Float[Array, "N K 2 64 D"]:
    """The queries of each tile and KV head, together; rows that are left are zero."""
    offsets = jnp.arange(tiles.tokens, dtype=jnp.int32)
    tokens = table.first_tokens[:, None] + offsets[None, :]
    gathered = q.at[tokens].get(mode="clip")  # [N, tile_q, H, D]
    heads = (tiles.num_kv_heads, tiles.group, tiles.head_dim)
    packed = gathered.reshape(*tokens.shape, *heads).transpose(0, 2, 1, 3, 4)
    packed = packed.reshape(-1, tiles.num_kv_heads, used_rows(tiles), tiles.head_dim)
    missing = TILE_ROWS - used_rows(tiles)
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, missing), (0, 0)))
    return packed.reshape(*packed.shape[:2], NUM_COMPUTE, ROWS, tiles.head_dim)


def unpack(
    out: Float[Array, "N K 2 64 D"],
    row_starts: Int[Array, " R"],
    num_tokens: int,
    tiles: MosaicTiles,
) -> Float[Array, "T K G D"]:
    """The results of the tokens, from those of the tiles; zeros for padding."""
    num_tiles, num_kv_heads = out.shape[:2]
    out = out.reshape(num_tiles, num_kv_heads, TILE_ROWS, -1)[:, :, : used_rows(tiles)]
    out = out.reshape(num_tiles, num_kv_heads, tiles.tokens, tiles.group, -1)
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    starts, ends = row_starts[:-1], row_starts[1:]
    rows = jnp.sum(tokens[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    is_used = rows < ends.shape[0]
    rows = jnp.minimum(rows, ends.shape[0] - 1)
    counts = -(-(ends - starts) // tiles.tokens)
    first_tiles = jnp.cumsum(counts, dtype=jnp.int32) - counts
    offsets = tokens - starts[rows]
    places = jnp.where(is_used, first_tiles[rows] + offsets // tiles.tokens, 0)
    found = out.at[places, :, offsets % tiles.tokens].get(mode="clip")
    return jnp.where(is_used[:, None, None, None], found, jnp.zeros_like(found))


def used_rows(tiles: MosaicTiles) -> int:
    """Rows of a tile that hold queries."""
    return tiles.tokens * tiles.group


def describe_tiles(
    table: TileTable,
    row_starts: Int[Array, " R"],
    lengths: Int[Array, " S"],
    tiles: MosaicTiles,
) -> Int[Array, "N 5"]:
    """Row, position of the first token, first key, end and length of each tile.

    A tile that is not used has no keys.
    """
    lengths_of_tiles = lengths[table.rows]
    ends_of_rows = row_starts[1:][table.rows]
    first_positions = lengths_of_tiles - (ends_of_rows - table.first_tokens)
    ends = jnp.maximum(first_positions + table.num_tokens, 0)
    ends = jnp.where(table.num_tokens > 0, jnp.minimum(ends, lengths_of_tiles), 0)
    begins = jnp.zeros_like(ends)
    if tiles.window is not None:
        oldest = jnp.maximum(first_positions - (tiles.window - 1), 0)
        begins = oldest // tiles.unit * tiles.unit
    columns = [table.rows, first_positions, begins, ends, lengths_of_tiles]
    return jnp.stack([column.astype(jnp.int32) for column in columns], axis=1)


class Scratch(NamedTuple):
    """Shared memory and barriers of a thread block."""

    ring: Ring
    queries: Any  # [2, 64, D], the results in the end
    vectors: Any  # [2, 64] for each of sinks and slopes
    queries_full: Any
    swap: Any
    cleared: Any

    @classmethod
    def types(cls, tiles: MosaicTiles, num_vectors: int) -> "Scratch":
        """What to allocate."""
        vector = plgpu.SMEM((NUM_COMPUTE, ROWS), jnp.float32)
        return cls(
            Ring.scratch(tiles, readers=NUM_COMPUTE),
            plgpu.SMEM((NUM_COMPUTE, ROWS, tiles.head_dim), tiles.dtype),
            [vector] * num_vectors,
            plgpu.Barrier(num_arrivals=NUM_COMPUTE + num_vectors),
            plgpu.Barrier(num_arrivals=NUM_COMPUTE),
            plgpu.Barrier(num_arrivals=1),
        )


def attend_tiles(
    q: Float[Array, "N K 2 64 D"],
    kv: Shaped[Array, "U W D"],
    block_tables: Int[Array, "S M"],
    described: Int[Array, "N 5"],
    vectors: list[Array],
    tiles: MosaicTiles,
    given: Given,
    target: Target,
) -> Float[Array, "N K 2 64 D"]:
    """Attends each tile; the results of tiles that are not used are undefined."""
    num_tiles = q.shape[0]

    def ragged_attention(*refs: Any) -> None:
        q, kv, tables, described, *vectors, out, scratch = refs
        # The last tiles of a sequence have the most keys; they go first.
        tile = num_tiles - 1 - lax.axis_index("tile")
        head, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")
        row, first_position = described[tile, 0], described[tile, 1]
        begin, end, length = (described[tile, column] for column in (2, 3, 4))
        run = Run(row, head, begin, end, length)

        @pl.when((run.end > run.begin) & (warpgroup == NUM_COMPUTE))
        def _copy() -> None:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            full = scratch.queries_full
            for half in range(NUM_COMPUTE):
                source, place = q.at[tile, head, half], scratch.queries.at[half]
                plgpu.copy_gmem_to_smem(source, place, full)
            for source, place in zip(vectors, scratch.vectors, strict=True):
                plgpu.copy_gmem_to_smem(source.at[head], place, full)
            copy_keys(kv, tables, run, scratch.ring, tiles)

        @pl.when((run.end > run.begin) & (warpgroup < NUM_COMPUTE))
        def _compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            _compute_half(
                run,
                first_position,
                warpgroup,
                scratch,
                out.at[tile, head],
                tiles,
                given,
            )

    kernel = plgpu.kernel(
        ragged_attention,
        out_type=jax.ShapeDtypeStruct(q.shape, tiles.dtype),
        scratch_types=[Scratch.types(tiles, len(vectors))],
        compiler_params=compiler_params(),
        grid=(num_tiles, tiles.num_kv_heads),
        grid_names=("tile", "head"),
        num_threads=NUM_COMPUTE + 1,
        thread_name="warpgroup",
        interpret=target.interpret or None,
    )
    return kernel(q, kv, block_tables, described, *vectors)


def _compute_half(
    run: Run,
    first_position: Array,
    warpgroup: Array,
    scratch: Scratch,
    out: Any,
    tiles: MosaicTiles,
    given: Given,
) -> None:
    """What a computing warpgroup does: its half of the tile's rows."""
    is_first = warpgroup == 0

    def swap() -> None:
        plgpu.barrier_arrive(scratch.swap)
        plgpu.barrier_wait(scratch.swap)

    def cleared() -> None:
        # One way: the first one would else wait for the second, half a step behind,
        # which waits for the first one's next swap.
        pl.when(is_first)(lambda: plgpu.barrier_arrive(scratch.cleared))
        pl.when(jnp.logical_not(is_first))(lambda: plgpu.barrier_wait(scratch.cleared))

    plgpu.barrier_wait(scratch.queries_full)
    memory = scratch.queries.at[warpgroup]
    slopes = scratch.vectors[-1][warpgroup] if given.slopes else None
    queries = Queries(memory, warpgroup * ROWS, first_position, slopes)
    turns = Turns(
        first=0,
        step=1,
        swap=swap,
        clears=is_first,
        cleared=cleared,
    )
    # The second one is half a step behind the first.
    pl.when(jnp.logical_not(is_first))(swap)
    state = attend(queries, run, scratch.ring, turns, tiles)
    pl.when(is_first)(swap)
    if given.sinks:
        sinks = scratch.vectors[0][warpgroup] * LOG2_E
        maximum = jnp.maximum(state.maximum, sinks)
        decay = jnp.exp2(state.maximum - maximum)
        weighted = state.weighted * as_columns(decay, tiles.head_dim)
        total = state.total * decay + jnp.exp2(sinks - maximum)
        # A token that sees nothing has zeros still, as all it has weighted is masked.
        state = state._replace(weighted=weighted, maximum=maximum, total=total)
    means, _ = normalised(state)
    memory[...] = means.astype(tiles.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(memory, out.at[warpgroup])
    plgpu.wait_smem_to_gmem(0)
