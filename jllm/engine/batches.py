"""What a step computes: rows brought up to date, tokens laid out row after row."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from jllm.engine.cache_groups import append_to_tables, copy_blocks, window_tables
from jllm.engine.inputs import DecodeInput, InputLayout, PrefillInput
from jllm.engine.state import EngineState, RowField, RowTable
from jllm.layers.kernels import TileTable
from jllm.models.base import Batch, CacheGroup
from jllm.sampling.rows import SamplingRows
from jllm.scheduler.plan import NO_BLOCK


class Turn(NamedTuple):
    """The rows of a step and how far each goes.

    Attributes:
        row_ids: Row of the table; ids past it are padding.
        rows: Their entries before the step.
        advance: Tokens that each computes.
        samples: Which of them sample a token.
    """

    row_ids: Int[Array, " S"]
    rows: RowTable
    advance: Int[Array, " S"]
    samples: Bool[Array, " S"]

    def positions(self) -> Int[Array, " S"]:
        """Length of each row after the step."""
        return self.rows.integer(RowField.POSITION) + self.advance

    def sampling(self) -> SamplingRows:
        """How the next token of each row is drawn."""
        return self.rows.sampling(self.positions())


def enter_decode(
    groups: Sequence[CacheGroup],
    layout: InputLayout,
    state: EngineState,
    inputs: DecodeInput,
) -> tuple[EngineState, Turn, Batch]:
    """The last sampled token of each row, with a block for it.

    Args:
        groups: Cache groups of the model.
        layout: Sizes of the program.
        state: Device state.
        inputs: What the host says.

    Returns:
        The state with the rows' tables, the rows, and their tokens.
    """
    rows = state.rows.take(inputs.rows)
    positions = rows.integer(RowField.POSITION)
    live = _live(rows, inputs.rows, state)
    block_size = state.block_tokens.shape[1]
    appends = live & (inputs.blocks != NO_BLOCK)
    state = append_to_tables(
        state,
        drop_unless(appends, inputs.rows, state),
        positions // block_size,
        inputs.blocks,
        inputs.window_blocks,
    )
    windows = window_tables(
        groups,
        layout,
        state,
        inputs.rows,
        positions,
        inputs.rows,
        positions,
        live,
    )
    batch = Batch(
        tokens=rows.integer(RowField.LAST_TOKEN),
        positions=positions,
        slots=_slots(state, inputs.rows, positions, live),
        block_tables=state.block_tables.at[inputs.rows].get(mode="clip"),
        row_starts=jnp.arange(layout.num_rows + 1, dtype=jnp.int32),
        lengths=jnp.where(live, positions + 1, 0),
        windows=windows,
        is_decode=True,
    )
    turn = Turn(inputs.rows, rows, live.astype(jnp.int32), live)
    return state, turn, batch


def enter_prefill(
    groups: Sequence[CacheGroup],
    layout: InputLayout,
    state: EngineState,
    inputs: PrefillInput,
) -> tuple[EngineState, Turn, Batch]:
    """Prompt chunks and single tokens; see `enter_decode`.

    Blocks are copied in the pools of the layers that the groups name.
    """
    state = _apply_updates(groups, state, inputs)
    rows = state.rows.take(inputs.rows)
    live = _live(rows, inputs.rows, state)
    batch = _ragged_batch(groups, layout, state, inputs, rows, live)
    advance = jnp.where(live, inputs.num_tokens, 0)
    return state, Turn(inputs.rows, rows, advance, live & (inputs.samples == 1)), batch


def record_tokens(state: EngineState, batch: Batch) -> EngineState:
    """Enters the tokens of a step in the token history of their rows."""
    block_size = state.block_tokens.shape[1]
    block_tokens = state.block_tokens.at[
        batch.slots // block_size, batch.slots % block_size
    ].set(batch.tokens, mode="drop", unique_indices=True)
    return dataclasses.replace(state, block_tokens=block_tokens)


def _live(rows: RowTable, row_ids: Array, state: EngineState) -> Bool[Array, " S"]:
    """Rows that compute: within the table and not done."""
    in_table = row_ids < state.block_tables.shape[0]
    return in_table & (rows.integer(RowField.DONE) == 0)


def drop_unless(
    keep: Bool[Array, " S"], row_ids: Int[Array, " S"], state: EngineState
) -> Int[Array, " S"]:
    """Row ids, replaced by distinct ones past the table where not `keep`."""
    num_rows = row_ids.shape[0]
    past = state.block_tables.shape[0] + num_rows + jnp.arange(num_rows)
    return jnp.where(keep, row_ids, past.astype(jnp.int32))


def _slots(
    state: EngineState,
    row_ids: Int[Array, " T"],
    positions: Int[Array, " T"],
    live: Bool[Array, " T"],
) -> Int[Array, " T"]:
    """Place of each token in the pool; distinct ones past it for tokens not live."""
    num_blocks, block_size = state.block_tokens.shape
    blocks = state.block_tables.at[row_ids, positions // block_size].get(mode="clip")
    past = num_blocks * block_size + jnp.arange(positions.shape[0])
    return jnp.where(
        live, blocks * block_size + positions % block_size, past.astype(jnp.int32)
    )


def _apply_updates(
    groups: Sequence[CacheGroup], state: EngineState, inputs: PrefillInput
) -> EngineState:
    """Copies blocks, initialises rows that start, appends to block tables."""
    state = copy_blocks(groups, state, inputs)
    starting = drop_unless(inputs.starts == 1, inputs.rows, state)
    rows = state.rows.put(starting, inputs.fields)
    ends = jnp.cumsum(inputs.num_blocks)
    entries = jnp.arange(inputs.blocks.shape[0], dtype=jnp.int32)
    owners = jnp.sum(entries[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    owners = jnp.minimum(owners, ends.shape[0] - 1)
    starts = (ends - inputs.num_blocks)[owners]
    columns = inputs.first_block[owners] + entries - starts
    used = entries < ends[-1]
    table_rows = jnp.where(used, inputs.rows[owners], state.block_tables.shape[0])
    # Unused entries are made distinct by their column; they are dropped by their row.
    columns = jnp.where(used, columns, entries)
    state = append_to_tables(
        state, table_rows, columns, inputs.blocks, inputs.window_blocks
    )
    return dataclasses.replace(state, rows=rows)


def _ragged_batch(
    groups: Sequence[CacheGroup],
    layout: InputLayout,
    state: EngineState,
    inputs: PrefillInput,
    rows: RowTable,
    live: Bool[Array, " S"],
) -> Batch:
    """Expands rows to tokens: which row, which position, which slot."""
    ends = jnp.cumsum(inputs.num_tokens)
    row_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    tokens = jnp.arange(layout.num_tokens, dtype=jnp.int32)
    owners = jnp.sum(tokens[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    used = owners < layout.num_rows
    owners = jnp.minimum(owners, layout.num_rows - 1)
    offsets = tokens - row_starts[owners]
    first = rows.integer(RowField.POSITION)
    positions = jnp.where(used, first[owners] + offsets, 0)
    last_tokens = rows.integer(RowField.LAST_TOKEN)
    uploaded = inputs.uploads[owners] == 1
    token_rows, computed = inputs.rows[owners], used & live[owners]
    return Batch(
        tokens=jnp.where(uploaded, inputs.tokens, last_tokens[owners]),
        positions=positions,
        slots=_slots(state, token_rows, positions, computed),
        block_tables=state.block_tables.at[inputs.rows].get(mode="clip"),
        row_starts=row_starts,
        lengths=jnp.where(live, first + inputs.num_tokens, inputs.num_tokens),
        tiles=_tile_table(layout, inputs),
        windows=window_tables(
            groups,
            layout,
            state,
            inputs.rows,
            first,
            token_rows,
            positions,
            computed,
        ),
    )


def _tile_table(layout: InputLayout, inputs: PrefillInput) -> TileTable | None:
    if layout.tiles is None or inputs.tiles is None:
        return None
    return TileTable(inputs.tiles, layout.tiles)
