"""Decode attention in Pallas on Triton: the keys of all rows shared out evenly.

A program of the main kernel attends the tokens of one row, for the query heads of one
KV head, to one share of the row's keys. How many shares a row has follows from the
lengths of all rows at run time, so that one long row among short ones is spread over
the whole device. A second kernel combines the shares.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.common.triton_attention import (
    LOG2_E,
    LOWEST,
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
from pallas_kernels.common.tuning import tuned_sizes

MAX_TILE_ROWS = 128
SHARES_PER_STEP = 32
"""Shares of a row that the second kernel loads at once."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shares:
    """How the keys of all rows are shared out.

    The number of shares depends on the lengths only at run time; at most `num_rows`
    more than `num_extra` exist, as each row has at least one, and each but one of a
    row has at least a `num_extra`-th of all keys.

    Attributes:
        num_rows: Sequences.
        num_extra: Shares beyond one for each row, at most.
        min_tiles: Least tiles of keys per share, the last one of a row aside.
        block_n: Keys per tile.
        num_new: Tokens of each row.
        capacity: Keys of a row at most.
        window: See `ScoreOptions`.
    """

    num_rows: int
    num_extra: int
    min_tiles: int
    block_n: int
    num_new: int
    capacity: int
    window: int | None

    @property
    def number(self) -> int:
        """Shares at most."""
        return self.num_rows + self.num_extra

    def begin(self, length: Int[Array, "..."]) -> Int[Array, "..."]:
        """First key that a row's tokens see."""
        return first_visible(self.window, length - self.num_new)

    def count_tiles(self, length: Int[Array, "..."]) -> Int[Array, "..."]:
        """Tiles of keys that a row's tokens see."""
        return divide_up(jnp.maximum(length - self.begin(length), 0), self.block_n)

    def plan(self, lengths_ref: Any) -> tuple[Int[Array, " N"], Int[Array, " N"]]:
        """The shares of each row, and the rows' numbers; `N` is a power of two."""
        rows = jnp.arange(power_of_two(self.num_rows), dtype=jnp.int32)
        exists = rows < self.num_rows
        lengths = pltriton.load(lengths_ref.at[rows], mask=exists, other=np.int32(0))
        tiles = self.count_tiles(jnp.minimum(lengths, self.capacity))
        share = jnp.maximum(
            divide_up(tiles.sum(), max(self.num_extra, 1)), self.min_tiles
        )
        if self.num_extra == 0:
            return exists.astype(jnp.int32), rows
        shares = jnp.maximum(divide_up(tiles, share), 1)
        return jnp.where(exists, shares, 0), rows


def paged_attention_gpu_triton(
    q: Float[Array, "S Q H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    kv_scales: Float[Array, "2 K"] | None,
    *,
    target: Target,
) -> Float[Array, "S Q H D"]:
    """Attends, reading each key and value once; see `api.paged_attention`.

    Source: Flash-Decoding, https://pytorch.org/blog/flash-decoding.
    """
    check_supported(q, kv, target)
    num_rows, num_new, num_heads, head_dim = q.shape
    num_kv_heads = kv.shape[2]
    if num_new * (num_heads // num_kv_heads) > MAX_TILE_ROWS:
        raise NotImplementedError(
            f"{num_new} tokens of {num_heads // num_kv_heads} query heads per KV head "
            f"are above {MAX_TILE_ROWS} tile rows on Triton"
        )
    sizes = tuned_sizes(
        "paged_attention",
        target,
        f"gpu_triton_{q.dtype}_{kv.dtype}_{head_dim}",
        default_sizes(q, kv, target),
    )
    flat = q.reshape(num_rows * num_new, num_heads, head_dim)
    tiles = plan_tiles(
        flat,
        kv,
        block_tables,
        options,
        tokens=num_new,
        block_n=sizes["block_n"],
        target=target,
    )
    max_tiles = -(-tiles.capacity // tiles.block_n)
    min_tiles = max(1, sizes["min_keys"] // tiles.block_n)
    shares = Shares(
        num_rows=num_rows,
        num_extra=min(
            -(-sizes["programs_per_core"] * target.num_cores // num_kv_heads),
            num_rows * (-(-max_tiles // min_tiles) - 1),
        ),
        min_tiles=min_tiles,
        block_n=tiles.block_n,
        num_new=num_new,
        capacity=tiles.capacity,
        window=options.window,
    )
    operands = gather_operands(flat, kv, block_tables, lengths, options, kv_scales)
    # The sums of a larger tile need the registers of more warps.
    num_bytes = tiles.rows * tiles.width * tiles.dtype.itemsize
    num_warps = sizes["num_warps"] * (2 if num_bytes >= 64 * 128 * 2 else 1)
    params = compiler_params(num_warps, sizes["num_stages"])
    out, *parts = _attend_shares(operands, tiles, shares, params, target)
    if parts:
        out = _combine_shares(out, parts, operands, tiles, shares, target)
    return out.reshape(q.shape)


def default_sizes(q: Array, kv: Array, target: Target) -> dict[str, int]:
    """Sizes of tiles: as many bytes in flight as fit beside a second program."""
    width = power_of_two(kv.shape[4])
    bytes_per_key = 2 * width * max(q.dtype.itemsize, kv.dtype.itemsize)
    small_memory = target.generation in ("sm_86", "sm_89", "sm_120")
    num_bytes = (16 if small_memory else 32) * 1024
    block_n = min(128, max(16, num_bytes // bytes_per_key))
    return {
        "block_n": block_n,
        "num_warps": 4,
        "num_stages": 5,
        "programs_per_core": 8,
        "min_keys": 256,
    }


def _attend_shares(
    operands: Refs,
    tiles: AttentionTiles,
    shares: Shares,
    params: pltriton.CompilerParams,
    target: Target,
) -> tuple[Array, ...]:
    """The output `[T, H, D]` of rows with one share; the parts of the others."""
    q, kv = operands.q, operands.kv
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if shares.num_extra:
        part = (shares.number, kv.shape[2], tiles.tokens * tiles.group)
        shapes += [jax.ShapeDtypeStruct(part, jnp.float32)] * 2
        shapes += [jax.ShapeDtypeStruct((*part, tiles.head_dim), jnp.float32)]
    outputs = pl.pallas_call(
        functools.partial(_share_kernel, tiles=tiles, shares=shares),
        # Heads first: programs that run at the same time read the same table.
        grid=(kv.shape[2], shares.number),
        out_shape=shapes,
        compiler_params=params,
        interpret=target.interpret,
        name="paged_attention",
    )(*operands)
    return tuple(outputs)


def _share_kernel(*all_refs: Any, tiles: AttentionTiles, shares: Shares) -> None:
    refs = Refs(*all_refs[: len(Refs._fields)])
    out_ref, *part_refs = all_refs[len(Refs._fields) :]
    head, item = pl.program_id(0), pl.program_id(1)
    row, share, num_shares = _find_share(refs, shares, item)

    @pl.when(row < shares.num_rows)
    def _attend() -> None:
        length = tiles.load_length(refs, row)
        tile = QueryTile(
            row, head, row * tiles.tokens, tiles.tokens, length - tiles.tokens
        )
        add_tiles = attend_keys(tiles, refs, tile, KeyRun(shares.begin(length), length))
        num_tiles = shares.count_tiles(length)
        tiles_per_share = divide_up(num_tiles, num_shares)
        first = share * tiles_per_share
        end = jnp.minimum(first + tiles_per_share, num_tiles)
        state = add_tiles(tiles.start(), first, end, is_masked=True)
        state = state._replace(weighted=scale_values(refs, tile, state.weighted))

        @pl.when(num_shares == 1)
        def _store_output() -> None:
            sinks = None
            if refs.sinks is not None:
                sinks = tiles.load_heads(refs.sinks, head)
            tiles.store_rows(out_ref, tile, tiles.finish(state, sinks))

        if part_refs:

            @pl.when(num_shares > 1)
            def _store_parts() -> None:
                rows = jnp.arange(tiles.rows, dtype=jnp.int32)
                used = tiles.used_rows(tiles.tokens)
                maximum_ref, total_ref, weighted_ref = part_refs
                pltriton.store(
                    maximum_ref.at[item, head, rows], state.maximum, mask=used
                )
                pltriton.store(total_ref.at[item, head, rows], state.total, mask=used)
                pltriton.store(
                    weighted_ref.at[
                        item, head, rows[:, None], tiles.columns()[None, :]
                    ],
                    state.weighted,
                    mask=tiles.mask(used, tiles.rows),
                )


def _find_share(
    refs: Refs, shares: Shares, item: Array
) -> tuple[Array, Array, Array | int]:
    """Row of a share, its number within the row, and shares of that row."""
    if shares.num_extra == 0:
        return item, jnp.zeros_like(item), jnp.ones_like(item)
    counts, rows = shares.plan(refs.lengths)
    ends = jnp.cumsum(counts)
    is_before = (ends <= item) & (rows < shares.num_rows)
    row = is_before.astype(jnp.int32).sum()
    share = item - jnp.where(is_before, counts, 0).sum()
    return row, share, jnp.where(rows == row, counts, 0).sum()


def _combine_shares(
    out: Float[Array, "T H D"],
    parts: list[Array],
    operands: Refs,
    tiles: AttentionTiles,
    shares: Shares,
    target: Target,
) -> Float[Array, "T H D"]:
    """Writes the outputs of the rows that have several shares."""
    num_heads = out.shape[1]
    # One query head of one token at a time, of which all shares are rows of a tile.
    return pl.pallas_call(
        functools.partial(_combine_kernel, tiles=tiles, shares=shares),
        grid=(tiles.tokens * num_heads, shares.num_rows),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={0: 0},
        compiler_params=compiler_params(4, 1),
        interpret=target.interpret,
        name="paged_attention_combine",
    )(out, *parts, operands.lengths, operands.sinks)


def _combine_kernel(
    _: Any,
    maximum_ref: Any,
    total_ref: Any,
    weighted_ref: Any,
    lengths_ref: Any,
    sinks_ref: Any,
    out_ref: Any,
    *,
    tiles: AttentionTiles,
    shares: Shares,
) -> None:
    number, row = pl.program_id(0), pl.program_id(1)
    rows_per_head = np.int32(tiles.tokens * tiles.group)
    head, tile_row = lax.div(number, rows_per_head), lax.rem(number, rows_per_head)
    token = lax.div(tile_row, np.int32(tiles.group))
    query_head = head * tiles.group + lax.rem(tile_row, np.int32(tiles.group))
    counts, rows = shares.plan(lengths_ref)
    first = jnp.where(rows < row, counts, 0).sum()
    num_shares = jnp.where(rows == row, counts, 0).sum()
    columns = tiles.columns()

    def add_shares(
        step: Array, state: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        maximum, total, weighted = state
        places = step * SHARES_PER_STEP + jnp.arange(SHARES_PER_STEP, dtype=jnp.int32)
        exists = places < num_shares
        items = first + places
        maxima = pltriton.load(
            maximum_ref.at[items, head, tile_row],
            mask=exists,
            other=np.float32(LOWEST),
        )
        totals = pltriton.load(
            total_ref.at[items, head, tile_row], mask=exists, other=np.float32(0)
        )
        parts = pltriton.load(
            weighted_ref.at[items[:, None], head, tile_row, columns[None, :]],
            mask=exists[:, None] & (columns < tiles.head_dim)[None, :],
            other=np.float32(0),
        )
        peak = jnp.maximum(maximum, maxima.max())
        decay, factors = jnp.exp2(maximum - peak), jnp.exp2(maxima - peak)
        return (
            peak,
            total * decay + (totals * factors).sum(),
            weighted * decay + (parts * factors[:, None]).sum(axis=0),
        )

    @pl.when(num_shares > 1)
    def _combine() -> None:
        start = jnp.float32(LOWEST), jnp.float32(0)
        if sinks_ref is not None:
            start = sinks_ref[query_head] * LOG2_E, jnp.float32(1)
        _, total, weighted = lax.fori_loop(
            np.int32(0),
            divide_up(num_shares, SHARES_PER_STEP),
            add_shares,
            (*start, jnp.zeros((tiles.width,), jnp.float32)),
        )
        result = weighted / jnp.where(total > 0, total, 1.0)
        pltriton.store(
            out_ref.at[row * tiles.tokens + token, query_head, columns],
            result.astype(tiles.query_dtype),
            mask=columns < tiles.head_dim,
        )
