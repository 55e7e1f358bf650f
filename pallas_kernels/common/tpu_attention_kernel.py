"""The body of the TPU kernel of attention over a paged cache.

The grid has one point. The kernel walks over tiles of queries, and for each over the
blocks of keys and values that the tile sees, some blocks (a chunk) at a time. Block
tables and the list of tiles lie in scalar memory; all else stays in HBM and comes by
DMA. A block of all heads, keys and values, is one contiguous run and one DMA. Chunks
are fetched several ahead in a ring of buffers, across the ends of tiles and rows, so
that the memory never waits for a row to begin.

Source: Ragged Paged Attention, https://github.com/vllm-project/tpu-inference; online
softmax as in FlashAttention-2, arXiv:2307.08691 section 2.3.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
LOG2_E = math.log2(math.e)
MASKED = -1e30
LOWEST = -1e29
"""Where the running maximum starts: above `MASKED`, so that the weight of a masked key
is exactly zero without a second selection."""

SMALL_ROWS = 64
"""Up to so many query rows the code of eight heads is unrolled, else that of two."""

TINY = 1e-37
TOKENS_PER_RUN = 16

GROUP_BUFFERS = 16
"""Sublane groups of the pool under way at once while a prompt is written."""


@dataclasses.dataclass(frozen=True, slots=True)
class TileSizes:
    """How the work is cut.

    Attributes:
        tile_q: Tokens of a tile at most.
        small_q: Tiles of at most so many tokens compute only as many; 0 for no such
            path.
        blocks_per_chunk: Blocks that are fetched and computed at once.
        num_buffers: Chunks in the ring: one computed, the others under way.
        is_ragged: Whether tiles may have fewer than `tile_q` tokens.
    """

    tile_q: int
    small_q: int
    blocks_per_chunk: int
    num_buffers: int
    is_ragged: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Everything the kernel knows when it is compiled."""

    sizes: TileSizes
    num_blocks: int
    num_kv_heads: int
    group: int
    block_size: int
    head_dim: int
    table_width: int
    sublanes: int
    compute_dtype: Any
    scale: float
    window: int | None
    soft_cap: float | None

    @property
    def rows(self) -> int:
        """Query rows of a full tile and KV head."""
        return self.sizes.tile_q * self.group

    @property
    def keys_per_chunk(self) -> int:
        """Places of a chunk."""
        return self.sizes.blocks_per_chunk * self.block_size

    @property
    def max_groups(self) -> int:
        """Sublane groups that a tile's tokens touch at most."""
        return (self.sizes.tile_q + 2 * self.sublanes - 2) // self.sublanes


@dataclasses.dataclass(slots=True)
class Refs:
    """The kernel's memory; None for what this variant does not have."""

    # Scalar memory.
    num_tiles: Any = None
    rows: Any = None
    first_tokens: Any = None
    num_tokens: Any = None
    first_positions: Any = None
    first_blocks: Any = None
    end_blocks: Any = None
    tables: Any = None
    scales: Any = None
    num_groups: Any = None
    group_blocks: Any = None
    group_places: Any = None
    group_starts: Any = None
    group_ends: Any = None
    # HBM.
    q: Any = None
    kv: Any = None
    out: Any = None
    group_values: Any = None
    new_keys: Any = None
    new_values: Any = None
    # VMEM: constants of each query row, then scratch.
    sinks: Any = None
    slopes: Any = None
    q_buffer: Any = None
    kv_buffer: Any = None
    out_buffer: Any = None
    packed_q: Any = None
    maximum: Any = None
    total: Any = None
    weighted: Any = None
    new_buffer: Any = None
    group_buffer: Any = None
    # Semaphores.
    q_sems: Any = None
    kv_sems: Any = None
    out_sems: Any = None
    new_sems: Any = None
    write_sems: Any = None
    read_sems: Any = None


class Cursor(NamedTuple):
    """The next chunk to fetch."""

    tile: Any
    chunk: Any


def sublanes_of(dtype: Any) -> int:
    """Rows of one tile of the vector memory: the unit in which rows are addressed."""
    return 32 // jnp.dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """The body of the kernel."""

    shape: Shape
    refs: Refs

    def run(self) -> None:
        """Walks over all tiles."""
        refs, shape = self.refs, self.shape
        num_tiles = refs.num_tiles[0]
        if refs.group_values is not None:
            self._write_groups()
        # What no DMA ever writes has weight zero, and must be no NaN.
        kv_buffer = refs.kv_buffer
        for slot in range(shape.sizes.num_buffers):
            for block in range(shape.sizes.blocks_per_chunk):
                values = kv_buffer.at[slot, block, 1]
                values[...] = jnp.zeros(values.shape, values.dtype)
        pl.when(num_tiles > 0)(lambda: self._start_queries(jnp.int32(0)))
        cursor = Cursor(jnp.int32(0), jnp.int32(0))
        for slot in range(shape.sizes.num_buffers - 1):
            cursor = self._fetch_next(cursor, slot)
        lax.fori_loop(0, num_tiles, self._tile, (cursor, jnp.int32(0)))

        def drain(tile: Any, _: None) -> None:
            self._wait_output(tile)
            if refs.new_keys is not None:
                self._wait_tokens_written(tile)

        lax.fori_loop(jnp.maximum(num_tiles - 2, 0), num_tiles, drain, None)

    # --- What a tile reads -------------------------------------------------------

    def _num_chunks(self, tile: Any) -> Any:
        """At least one, so that tiles that see nothing need no path of their own."""
        num_blocks = self.refs.end_blocks[tile] - self.refs.first_blocks[tile]
        per_chunk = self.shape.sizes.blocks_per_chunk
        return jnp.maximum(lax.div(num_blocks + per_chunk - 1, per_chunk), 1)

    def _copy_chunk(self, cursor: Cursor, slot: Any, *, start: bool) -> None:
        """Starts, or awaits, the DMA of each block of a chunk."""
        refs, shape = self.refs, self.shape
        tile, chunk = cursor
        first = refs.first_blocks[tile] + chunk * shape.sizes.blocks_per_chunk
        row = refs.rows[tile] * shape.table_width
        for i in range(shape.sizes.blocks_per_chunk):

            @pl.when(first + i < refs.end_blocks[tile])
            def _(i: int = i) -> None:
                block = jnp.clip(refs.tables[row + first + i], 0, shape.num_blocks - 1)
                copy = pltpu.make_async_copy(
                    refs.kv.at[block], refs.kv_buffer.at[slot, i], refs.kv_sems.at[slot]
                )
                _start_or_wait(copy, start=start)

    def _fetch_next(self, cursor: Cursor, slot: Any) -> Cursor:
        """Starts the chunk at the cursor, if there is one; moves the cursor on."""
        tile, chunk = cursor
        num_tiles = self.refs.num_tiles[0]
        is_live = tile < num_tiles

        @pl.when(is_live)
        def _() -> None:
            self._copy_chunk(cursor, slot, start=True)

        last = self._num_chunks(jnp.minimum(tile, jnp.maximum(num_tiles - 1, 0))) - 1
        ends = chunk >= last
        return Cursor(jnp.where(ends, tile + 1, tile), jnp.where(ends, 0, chunk + 1))

    def _pieces(self, tile: Any) -> Iterator[tuple[Any, int, Any]]:
        """Runs of tokens that together are the tile's: offset, size, whether it is.

        The size of a DMA is fixed when the kernel is compiled, hence one run for each
        bit of the number.
        """
        tile_q = self.shape.sizes.tile_q
        if not self.shape.sizes.is_ragged:
            yield 0, tile_q, True
            return
        count = self.refs.num_tokens[tile]
        for bit in reversed(range(tile_q.bit_length())):
            size = 1 << bit
            offset = (count >> (bit + 1)) << (bit + 1)
            yield offset, size, (count & size) != 0

    def _copy_queries(self, tile: Any, *, start: bool) -> None:
        refs = self.refs
        parity = lax.rem(tile, 2)
        first = refs.first_tokens[tile]
        pairs = [(refs.q, refs.q_buffer.at[parity])]
        if refs.new_keys is not None:
            pairs += [
                (refs.new_keys, refs.new_buffer.at[parity, 0]),
                (refs.new_values, refs.new_buffer.at[parity, 1]),
            ]
        for offset, size, is_used in self._pieces(tile):

            @pl.when(is_used)
            def _(offset: Any = offset, size: int = size) -> None:
                for source, target in pairs:
                    copy = pltpu.make_async_copy(
                        source.at[pl.ds(first + offset, size)],
                        target.at[pl.ds(offset, size)],
                        refs.q_sems.at[parity],
                    )
                    _start_or_wait(copy, start=start)

    def _start_queries(self, tile: Any) -> None:
        self._copy_queries(tile, start=True)

    def _copy_output(self, tile: Any, *, start: bool) -> None:
        refs = self.refs
        parity = lax.rem(tile, 2)
        first = refs.first_tokens[tile]
        for offset, size, is_used in self._pieces(tile):

            @pl.when(is_used)
            def _(offset: Any = offset, size: int = size) -> None:
                copy = pltpu.make_async_copy(
                    refs.out_buffer.at[parity, pl.ds(offset, size)],
                    refs.out.at[pl.ds(first + offset, size)],
                    refs.out_sems.at[parity],
                )
                _start_or_wait(copy, start=start)

    def _wait_output(self, tile: Any) -> None:
        self._copy_output(tile, start=False)

    # --- One tile ----------------------------------------------------------------

    def _tile(self, tile: Any, carry: tuple[Cursor, Any]) -> tuple[Cursor, Any]:
        refs, shape = self.refs, self.shape
        num_tiles = refs.num_tiles[0]
        pl.when(tile + 1 < num_tiles)(lambda: self._start_queries(tile + 1))
        self._copy_queries(tile, start=False)
        self._for_size(tile, lambda tokens: self._begin(tile, tokens))
        num_buffers = shape.sizes.num_buffers

        def add_chunk(chunk: Any, carry: tuple[Cursor, Any]) -> tuple[Cursor, Any]:
            cursor, slot = carry
            # The buffer before this one was computed last, and is free.
            cursor = self._fetch_next(
                cursor, _wrap(slot + num_buffers - 1, num_buffers)
            )
            self._copy_chunk(Cursor(tile, chunk), slot, start=False)
            self._prepare_chunk(tile, chunk, slot)
            is_live = refs.end_blocks[tile] > refs.first_blocks[tile]

            @pl.when(is_live)
            def _() -> None:
                self._for_size(
                    tile, lambda tokens: self._add_chunk(tile, chunk, slot, tokens)
                )

            return cursor, _wrap(slot + 1, num_buffers)

        carry = lax.fori_loop(0, self._num_chunks(tile), add_chunk, carry)
        pl.when(tile >= 2)(lambda: self._wait_output(tile - 2))
        self._for_size(tile, lambda tokens: self._finish(tile, tokens))
        self._copy_output(tile, start=True)
        return carry

    def _for_size(self, tile: Any, body: Callable[[int], None]) -> None:
        """Runs the body for the number of tokens that the tile is computed as."""
        sizes = self.shape.sizes
        if sizes.small_q == 0:
            body(sizes.tile_q)
            return
        is_small = self.refs.num_tokens[tile] <= sizes.small_q
        pl.when(is_small)(lambda: body(sizes.small_q))
        pl.when(jnp.logical_not(is_small))(lambda: body(sizes.tile_q))

    def _begin(self, tile: Any, tokens: int) -> None:
        """Brings each KV head's queries together and starts the running sums."""
        refs, shape = self.refs, self.shape
        rows, group = tokens * shape.group, shape.group
        parity = lax.rem(tile, 2)

        def pack(first: Any, size: int) -> None:
            for head in range(shape.num_kv_heads):
                heads = slice(head * group, (head + 1) * group)
                q = refs.q_buffer[parity, pl.ds(first, size), heads, :]
                q = q.astype(jnp.float32).reshape(size * group, shape.head_dim)
                target = pl.ds(first * group, size * group)
                refs.packed_q[head, target] = q.astype(shape.compute_dtype)

        _for_tokens(tokens, pack)
        stats = (shape.num_kv_heads, rows, LANES)
        if refs.sinks is None:
            refs.maximum[:, :rows] = jnp.full(stats, LOWEST, jnp.float32)
            refs.total[:, :rows] = jnp.zeros(stats, jnp.float32)
        else:
            refs.maximum[:, :rows] = refs.sinks[:, :rows] * LOG2_E
            refs.total[:, :rows] = jnp.ones(stats, jnp.float32)
        weighted = (shape.num_kv_heads, rows, shape.head_dim)
        refs.weighted[:, :rows] = jnp.zeros(weighted, jnp.float32)

    def _prepare_chunk(self, tile: Any, chunk: Any, slot: Any) -> None:
        """Puts new tokens into the chunk; clears values past the newest query's."""
        refs, shape = self.refs, self.shape
        first_block = refs.first_blocks[tile] + chunk * shape.sizes.blocks_per_chunk
        newest = refs.first_positions[tile] + refs.num_tokens[tile] - 1
        if refs.new_keys is not None:
            self._insert_tokens(tile, first_block, slot)
        end = newest + 1
        index = lax.div(end, shape.block_size) - first_block
        place = lax.rem(end, shape.block_size)
        is_here = (index >= 0) & (index < shape.sizes.blocks_per_chunk)
        is_here &= first_block + index < refs.end_blocks[tile]

        @pl.when(is_here & (end > 0) & (place > 0))
        def _() -> None:
            def clear(head: Any, _: None) -> None:
                values = refs.kv_buffer.at[slot, index, 1, head]
                kept = lax.broadcasted_iota(jnp.int32, values.shape, 0) < place
                read = values[...].astype(jnp.float32)
                values[...] = jnp.where(kept, read, 0.0).astype(values.dtype)

            lax.fori_loop(0, shape.num_kv_heads, clear, None)

    def _add_chunk(self, tile: Any, chunk: Any, slot: Any, tokens: int) -> None:
        """Adds a chunk's keys to the running sums, masked only where it has to be."""
        refs, shape = self.refs, self.shape
        first_block = refs.first_blocks[tile] + chunk * shape.sizes.blocks_per_chunk
        first_key = first_block * shape.block_size
        oldest = refs.first_positions[tile]
        newest = oldest + refs.num_tokens[tile] - 1
        is_full = first_key + shape.keys_per_chunk - 1 <= oldest
        if shape.window is not None:
            is_full &= newest - first_key < shape.window
        distance_to_first = oldest - first_key

        @pl.when(is_full)
        def _() -> None:
            self._add_heads(slot, tokens, distance_to_first, is_masked=False)

        @pl.when(jnp.logical_not(is_full))
        def _() -> None:
            self._add_heads(slot, tokens, distance_to_first, is_masked=True)

    def _add_heads(
        self, slot: Any, tokens: int, distance_to_first: Any, *, is_masked: bool
    ) -> None:
        refs, shape = self.refs, self.shape
        rows, num_keys = tokens * shape.group, shape.keys_per_chunk
        # How far each key lies before each query; computed where it is used.
        query = lax.broadcasted_iota(jnp.int32, (rows, num_keys), 0)
        key = lax.broadcasted_iota(jnp.int32, (rows, num_keys), 1)
        distance = lax.div(query, jnp.int32(shape.group)) - key + distance_to_first
        visible = None
        if is_masked:
            visible = distance >= 0
            if shape.window is not None:
                visible &= distance < shape.window
            # Queries before position 0 see nothing: their distances are negative, as
            # no key lies before position 0.

        def add_head(head: Any) -> None:
            scores = self._scores(slot, head, rows, distance)
            if visible is not None:
                scores = jnp.where(visible, scores, MASKED)
            old_maximum = refs.maximum[head, :rows]
            peak = jnp.max(scores, axis=1, keepdims=True)
            maximum = jnp.maximum(old_maximum, peak)
            weights = jnp.exp2(scores - maximum[:, :1])
            decay = jnp.exp2(old_maximum - maximum)
            total = jnp.sum(weights, axis=1, keepdims=True)
            values = self._keys_or_values(slot, 1, head)
            products = _dot(weights.astype(values.dtype), values, transposed=False)
            refs.maximum[head, :rows] = maximum
            refs.total[head, :rows] = refs.total[head, :rows] * decay + total
            refs.weighted[head, :rows] = (
                refs.weighted[head, :rows] * decay[:, :1] + products
            )

        self._for_heads(add_head, unroll=8 if rows <= SMALL_ROWS else 2)

    def _for_heads(self, body: Callable[[Any], None], *, unroll: int) -> None:
        """Runs the body for each KV head, some of them as one stretch of code.

        What is unrolled can overlap, the products of a head with the weights of
        another; with many rows there is enough to overlap within a head.
        """
        num_heads = self.shape.num_kv_heads
        unroll = math.gcd(unroll, num_heads) if num_heads > unroll else num_heads

        def step(i: Any, _: None) -> None:
            for j in range(unroll):
                body(i * unroll + j)

        if unroll == num_heads:
            step(0, None)
        else:
            lax.fori_loop(0, num_heads // unroll, step, None)

    def _keys_or_values(self, slot: Any, which: int, head: Any) -> Any:
        shape = self.shape
        read = self.refs.kv_buffer[slot, :, which, head]
        if read.dtype.itemsize == 1:
            read = read.astype(jnp.float32)
        read = read.reshape(shape.keys_per_chunk, shape.head_dim)
        return read.astype(shape.compute_dtype)

    def _scores(self, slot: Any, head: Any, rows: int, distance: Any) -> Any:
        """Scores in units of the binary logarithm: a power of two costs less."""
        refs, shape = self.refs, self.shape
        q = refs.packed_q[head, :rows]
        scores = _dot(q, self._keys_or_values(slot, 0, head), transposed=True)
        scale = shape.scale
        if refs.scales is not None:
            scale = scale * refs.scales[head]
        if shape.soft_cap is None:
            scores = scores * (scale * LOG2_E)
        else:
            scores = jnp.tanh(scores * (scale / shape.soft_cap))
            scores = scores * (shape.soft_cap * LOG2_E)
        if refs.slopes is not None:
            slopes = refs.slopes[head, :rows][:, :1] * LOG2_E
            scores = scores - slopes * distance.astype(jnp.float32)
        return scores

    def _finish(self, tile: Any, tokens: int) -> None:
        refs, shape = self.refs, self.shape
        group = shape.group
        parity = lax.rem(tile, 2)

        def unpack(first: Any, size: int) -> None:
            for head in range(shape.num_kv_heads):
                rows = pl.ds(first * group, size * group)
                total = jnp.maximum(refs.total[head, rows][:, :1], TINY)
                out = refs.weighted[head, rows] / total
                if refs.scales is not None:
                    out = out * refs.scales[shape.num_kv_heads + head]
                out = out.reshape(size, group, shape.head_dim)
                heads = slice(head * group, (head + 1) * group)
                target = (parity, pl.ds(first, size), heads)
                refs.out_buffer[target] = out.astype(refs.out_buffer.dtype)

        _for_tokens(tokens, unpack)

    # --- New tokens --------------------------------------------------------------

    def _insert_tokens(self, tile: Any, first_block: Any, slot: Any) -> None:
        """Puts the tile's tokens into the chunk and sends them back to the pool.

        They go through a buffer of their own, so that the chunk's need not wait for
        them: the sublane groups that hold them, since no smaller part of the pool can
        be addressed.
        """
        refs, shape = self.refs, self.shape

        @pl.when((first_block == refs.first_blocks[tile]) & (tile >= 2))
        def _() -> None:
            self._wait_tokens_written(tile - 2)

        for i in range(shape.max_groups):
            base, is_used = self._token_group(tile, i)
            index = lax.div(base, shape.block_size) - first_block
            is_here = (index >= 0) & (index < shape.sizes.blocks_per_chunk)

            @pl.when(is_used & is_here)
            def _(i: int = i, base: Any = base, index: Any = index) -> None:
                self._merge_group(tile, base, refs.kv_buffer.at[slot, index], i)
                copy, is_in_pool = self._group_copy(tile, i)
                pl.when(is_in_pool)(copy.start)

    def _token_group(self, tile: Any, i: int) -> tuple[Any, Any]:
        """Position at which a group of new tokens begins; whether it is used."""
        refs, shape = self.refs, self.shape
        oldest = jnp.maximum(refs.first_positions[tile], 0)
        newest = refs.first_positions[tile] + refs.num_tokens[tile] - 1
        base = (lax.div(oldest, shape.sublanes) + i) * shape.sublanes
        is_in_table = base < refs.end_blocks[tile] * shape.block_size
        return base, (base <= newest) & is_in_table

    def _merge_group(self, tile: Any, base: Any, block: Any, i: int) -> None:
        refs, shape = self.refs, self.shape
        parity = lax.rem(tile, 2)
        first = refs.first_positions[tile] - base
        offset = pl.multiple_of(lax.rem(base, shape.block_size), shape.sublanes)
        for which in range(2):
            new = refs.new_buffer[parity, which]  # [Q, K, D]
            for head in range(shape.num_kv_heads):
                run = block.at[which, head, pl.ds(offset, shape.sublanes)]
                merged = run[...].astype(jnp.float32)
                place = lax.broadcasted_iota(jnp.int32, merged.shape, 0)
                for token in range(shape.sizes.tile_q):
                    row = jnp.broadcast_to(new[token, head : head + 1], merged.shape)
                    merged = jnp.where(place == first + token, row, merged)
                run[...] = merged.astype(run.dtype)
                refs.group_buffer[parity, i, which, head] = merged.astype(run.dtype)

    def _group_copy(self, tile: Any, i: int) -> tuple[Any, Any]:
        """The DMA that writes a group of new tokens; whether its block exists."""
        refs, shape = self.refs, self.shape
        parity = lax.rem(tile, 2)
        base, _ = self._token_group(tile, i)
        run = jnp.minimum(lax.div(base, shape.block_size), shape.table_width - 1)
        block = refs.tables[refs.rows[tile] * shape.table_width + run]
        is_in_pool = (block >= 0) & (block < shape.num_blocks)
        offset = pl.multiple_of(lax.rem(base, shape.block_size), shape.sublanes)
        copy = pltpu.make_async_copy(
            refs.group_buffer.at[parity, i],
            refs.kv.at[
                jnp.clip(block, 0, shape.num_blocks - 1),
                :,
                :,
                pl.ds(offset, shape.sublanes),
            ],
            refs.write_sems.at[parity],
        )
        return copy, is_in_pool

    def _wait_tokens_written(self, tile: Any) -> None:
        for i in range(self.shape.max_groups):
            _, is_used = self._token_group(tile, i)
            copy, is_in_pool = self._group_copy(tile, i)
            pl.when(is_used & is_in_pool)(copy.wait)

    def _write_groups(self) -> None:
        """Writes all new tokens into the pool, before any of it is read.

        A ring of buffers: in half of it groups are on their way in, in the other half
        on their way back. A group that takes nothing, for its block is not in the pool,
        must not be written back either: its clamped place may be another group's.
        """
        refs = self.refs
        num_groups = refs.num_groups[0]
        lead = GROUP_BUFFERS // 2

        def is_used(i: Any) -> Any:
            group = jnp.clip(i, 0, jnp.maximum(num_groups - 1, 0))
            takes = refs.group_ends[group] > refs.group_starts[group]
            return (i >= 0) & (i < num_groups) & takes

        def step(i: Any, _: None) -> None:
            @pl.when(is_used(i - GROUP_BUFFERS))
            def _() -> None:
                self._group_write(i - GROUP_BUFFERS).wait()

            @pl.when(is_used(i))
            def _() -> None:
                for copy in self._group_reads(i):
                    copy.start()

            @pl.when(is_used(i - lead))
            def _() -> None:
                for copy in self._group_reads(i - lead):
                    copy.wait()
                self._merge_read_group(i - lead)
                self._group_write(i - lead).start()

        lax.fori_loop(0, num_groups + GROUP_BUFFERS, step, None)

    def _pool_group(self, i: Any) -> Any:
        refs, shape = self.refs, self.shape
        place = pl.multiple_of(refs.group_places[i], shape.sublanes)
        return refs.kv.at[refs.group_blocks[i], :, :, pl.ds(place, shape.sublanes)]

    def _group_reads(self, i: Any) -> tuple[Any, Any]:
        refs = self.refs
        slot = lax.rem(i, GROUP_BUFFERS)
        sem = refs.read_sems.at[slot]
        old, new = refs.group_buffer.at[slot, 0], refs.group_buffer.at[slot, 1]
        return (
            pltpu.make_async_copy(self._pool_group(i), old, sem),
            pltpu.make_async_copy(refs.group_values.at[i], new, sem),
        )

    def _merge_read_group(self, i: Any) -> None:
        refs, shape = self.refs, self.shape
        slot = lax.rem(i, GROUP_BUFFERS)
        start, end = refs.group_starts[i], refs.group_ends[i]

        @pl.when((start > 0) | (end < shape.sublanes))
        def _() -> None:
            for which in range(2):
                old = refs.group_buffer[slot, 0, which].astype(jnp.float32)
                new = refs.group_buffer[slot, 1, which].astype(jnp.float32)
                place = lax.broadcasted_iota(jnp.int32, old.shape, 1)
                is_new = (place >= start) & (place < end)
                merged = jnp.where(is_new, new, old)
                refs.group_buffer[slot, 1, which] = merged.astype(refs.kv.dtype)

    def _group_write(self, i: Any) -> Any:
        refs = self.refs
        slot = lax.rem(i, GROUP_BUFFERS)
        source = refs.group_buffer.at[slot, 1]
        sem = refs.write_sems.at[slot]
        return pltpu.make_async_copy(source, self._pool_group(i), sem)


def _start_or_wait(copy: Any, *, start: bool) -> None:
    if start:
        copy.start()
    else:
        copy.wait()


def _for_tokens(tokens: int, body: Callable[[Any, int], None]) -> None:
    """Runs the body for runs of tokens, each a whole number of sublane tiles."""
    if tokens % TOKENS_PER_RUN:
        body(0, tokens)
        return

    def step(i: Any, _: None) -> None:
        body(pl.multiple_of(i * TOKENS_PER_RUN, TOKENS_PER_RUN), TOKENS_PER_RUN)

    lax.fori_loop(0, tokens // TOKENS_PER_RUN, step, None)


def _wrap(slot: Any, num_buffers: int) -> Any:
    return jnp.where(slot >= num_buffers, slot - num_buffers, slot)


def _dot(left: Any, right: Any, *, transposed: bool) -> Any:
    """A product with float32 sums; of float32 in full precision."""
    is_float32 = left.dtype == jnp.float32
    return lax.dot_general(
        left,
        right,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if is_float32 else None,
        preferred_element_type=jnp.float32,
    )
