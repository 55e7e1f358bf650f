"""The device's part of cache groups: tables and copies of the layers with a window."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from jllm.engine.inputs import InputLayout, PrefillInput
from jllm.engine.state import EngineState
from jllm.layers.attention import copy_cache_blocks
from jllm.layers.batch import WindowTables
from jllm.models.base import CacheGroup


def append_to_tables(
    state: EngineState,
    rows: Int[Array, " A"],
    columns: Int[Array, " A"],
    blocks: Int[Array, " A"],
    window_blocks: Int[Array, "G A"] | None,
) -> EngineState:
    """Writes entries into the tables of all groups, at the same places.

    Args:
        state: Device state.
        rows: Row of each entry; those past the table, all distinct, are dropped.
        columns: Its index in the row.
        blocks: The entries of the group that keeps the whole context.
        window_blocks: Those of the others, if there are any.
    """

    def put(table: Array, entries: Array) -> Array:
        places = table.at[rows, columns]
        return places.set(entries, mode="drop", unique_indices=True)

    others = () if window_blocks is None else window_blocks
    return dataclasses.replace(
        state,
        block_tables=put(state.block_tables, blocks),
        window_tables=tuple(
            put(table, entries)
            for table, entries in zip(state.window_tables, others, strict=True)
        ),
    )


def window_tables(
    groups: Sequence[CacheGroup],
    layout: InputLayout,
    state: EngineState,
    rows: Int[Array, " S"],
    starts: Int[Array, " S"],
    owners: Int[Array, " T"],
    positions: Int[Array, " T"],
    live: Bool[Array, " T"],
) -> tuple[WindowTables, ...]:
    """Where a step's tokens lie in the pools of the groups with a window.

    A kernel reads whole runs of blocks, hence some before the window. Those entries
    name the first block of the window here, so that nothing of another row is read: a
    weight of zero does not cancel a NaN.

    Args:
        groups: All groups of the model.
        layout: Sizes of the program.
        state: Device state, with this step's entries in its tables.
        rows: Row of the table of each row of the step.
        starts: Position of the first token of each in this step.
        owners: Row of the table of each token.
        positions: Its position.
        live: Whether it is computed.
    """
    block_size = state.block_tokens.shape[1]
    found: list[WindowTables] = []
    sizes = layout.window_pool_blocks
    for group, table, size in zip(groups[1:], state.window_tables, sizes, strict=True):
        assert group.window is not None
        # As the scheduler does: a block at least, so that the first one is full.
        window = max(group.window, block_size)
        first = jnp.maximum(starts - (window - 1), 0) // block_size
        columns = jnp.arange(table.shape[1], dtype=jnp.int32)[None, :]
        seen = jnp.maximum(columns, first[:, None].astype(jnp.int32))
        blocks = table.at[owners, positions // block_size].get(mode="clip")
        past = size * block_size + jnp.arange(positions.shape[0])
        slots = blocks * block_size + positions % block_size
        found.append(
            WindowTables(
                slots=jnp.where(live, slots, past.astype(jnp.int32)),
                block_tables=table.at[rows[:, None], seen].get(mode="clip"),
            )
        )
    return tuple(found)


def copy_blocks(
    groups: Sequence[CacheGroup], state: EngineState, inputs: PrefillInput
) -> EngineState:
    """Copies whole blocks in the pools of every group, and in the token history."""
    kv = list(state.kv)
    *full, block_tokens = copy_cache_blocks(
        (*(kv[layer] for layer in groups[0].layers), state.block_tokens),
        inputs.copy_sources,
        inputs.copy_targets,
    )
    for layer, pool in zip(groups[0].layers, full, strict=True):
        kv[layer] = pool
    if inputs.window_sources is not None and inputs.window_targets is not None:
        copies = (inputs.window_sources, inputs.window_targets)
        for group, sources, targets in zip(groups[1:], *copies, strict=True):
            pools = tuple(kv[layer] for layer in group.layers)
            copied = copy_cache_blocks(pools, sources, targets)
            for layer, pool in zip(group.layers, copied, strict=True):
                kv[layer] = pool
    return dataclasses.replace(state, kv=tuple(kv), block_tokens=block_tokens)
