"""The one packed step input: a vector of int32 that carries only what changed.

Positions, lengths, slots and the last sampled tokens are on the device already. The
layout of the vector is static per program, so that unpacking is a set of static slices.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Int

from jllm.engine.state import NUM_FIELDS
from jllm.layers.kernels import TileLayout, make_tiles
from jllm.scheduler.plan import NO_BLOCK, DecodeRows, ScheduledRow, StepPlan


class DecodeInput(NamedTuple):
    """Input of a decode step: one token per row, the one that it sampled last.

    Attributes:
        rows: Row of the table; ids past the table mark padding, all distinct.
        blocks: Block appended to the row's table in this step, or `NO_BLOCK`.
        window_blocks: The same in each cache group with a window, if there are any.
    """

    rows: Int[Array, " S"]
    blocks: Int[Array, " S"]
    window_blocks: Int[Array, "G S"] | None = None


class PrefillInput(NamedTuple):
    """Input of a prefill step: any mix of prompt chunks and single tokens.

    Attributes:
        rows: Row of the table; ids past the table mark padding, all distinct.
        num_tokens: Tokens of the row in this step.
        samples: 1 where the row samples a token.
        starts: 1 where the row is initialised from `fields`.
        uploads: 1 where the tokens are in `tokens`, 0 where it is the last sampled one.
        first_block: Index in the row's table of its first appended block.
        num_blocks: Blocks appended to the row's table, taken in turn from `blocks`.
        fields: Row table entries of the rows that start.
        copy_sources: Blocks copied before the step.
        copy_targets: Where to; ids past the pool mark padding, all distinct.
        blocks: Appended blocks of all rows.
        tokens: Tokens of all rows.
        tiles: A `TileTable` in one vector; None where the kernels read none.
        window_sources: As `copy_sources`, in each cache group with a window.
        window_targets: As `copy_targets`.
        window_blocks: As `blocks`.
    """

    rows: Int[Array, " S"]
    num_tokens: Int[Array, " S"]
    samples: Int[Array, " S"]
    starts: Int[Array, " S"]
    uploads: Int[Array, " S"]
    first_block: Int[Array, " S"]
    num_blocks: Int[Array, " S"]
    fields: Int[Array, "S F"]
    copy_sources: Int[Array, " C"]
    copy_targets: Int[Array, " C"]
    blocks: Int[Array, " A"]
    tokens: Int[Array, " T"]
    tiles: Int[Array, " W"] | None = None
    window_sources: Int[Array, "G C"] | None = None
    window_targets: Int[Array, "G C"] | None = None
    window_blocks: Int[Array, "G A"] | None = None


@dataclasses.dataclass(frozen=True)
class InputLayout:
    """Sizes of one program's input, hence the layout of its vector.

    Attributes:
        kind: Which of the two inputs.
        num_rows: Rows `S` of the step.
        num_tokens: Tokens `T` of the step; equals `num_rows` for decode.
        table_rows: Rows `R` of the table.
        num_pool_blocks: Blocks `B` of the pool.
        max_appends: Most blocks appended in a prefill step.
        max_copies: Most blocks copied in a prefill step.
        tiles: How the tokens of a prefill step are cut for attention, if they are.
        scored_rows: Numbers of rows, ascending, for which a prefill step can compute
            scores; it takes the smallest that holds the rows that sample, which come
            first. The last is `num_rows`.
        window_pool_blocks: Blocks of the pool of each cache group with a window.
    """

    kind: Literal["prefill", "decode"]
    num_rows: int
    num_tokens: int
    table_rows: int
    num_pool_blocks: int
    max_appends: int
    max_copies: int
    tiles: TileLayout | None
    scored_rows: tuple[int, ...]
    window_pool_blocks: tuple[int, ...] = ()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each section of the vector, in order."""
        rows = (self.num_rows,)
        num_windows = len(self.window_pool_blocks)
        if self.kind == "decode":
            decode = {"rows": rows, "blocks": rows}
            appended = {"window_blocks": (num_windows, self.num_rows)}
            return decode | appended if num_windows else decode
        return {
            **dict.fromkeys(PrefillInput._fields[:7], rows),
            "fields": (self.num_rows, NUM_FIELDS),
            "copy_sources": (self.max_copies,),
            "copy_targets": (self.max_copies,),
            "blocks": (self.max_appends,),
            "tokens": (self.num_tokens,),
            **self._tile_shapes,
            **self._window_shapes,
        }

    @property
    def _window_shapes(self) -> dict[str, tuple[int, ...]]:
        count = len(self.window_pool_blocks)
        if not count:
            return {}
        return {
            "window_sources": (count, self.max_copies),
            "window_targets": (count, self.max_copies),
            "window_blocks": (count, self.max_appends),
        }

    @property
    def _tile_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.tiles is None:
            return {}
        return {"tiles": (self.tiles.table_size(self.num_rows, self.num_tokens),)}

    @cached_property
    def empty(self) -> np.ndarray:
        """The vector of a step without rows; not to be changed."""
        vector = np.zeros(self.size, np.int32)
        sections = split_vector(self, vector)
        sections["rows"][:] = np.arange(self.num_rows) + self.table_rows
        if self.kind == "decode":
            sections["blocks"][:] = NO_BLOCK
        else:
            copies = np.arange(self.max_copies)
            sections["copy_targets"][:] = copies + self.num_pool_blocks
            for group, num_blocks in enumerate(self.window_pool_blocks):
                sections["window_targets"][group] = copies + num_blocks
        return vector

    @cached_property
    def size(self) -> int:
        """Length of the vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def split_vector(layout: InputLayout, vector: Any) -> dict[str, Any]:
    """Sections of a vector by name; views of a numpy vector, slices of a JAX one."""
    sections: dict[str, Any] = {}
    offset = 0
    for name, shape in layout.shapes.items():
        size = math.prod(shape)
        sections[name] = vector[offset : offset + size].reshape(shape)
        offset += size
    return sections


def pack(
    plan: StepPlan,
    layout: InputLayout,
    start_fields: Callable[[ScheduledRow], np.ndarray],
) -> np.ndarray:
    """The vector of a plan, always a fresh buffer: a transfer may alias it.

    Args:
        plan: What to compute; its rows and tokens fit the layout.
        layout: Layout of the program that will run.
        start_fields: Gives the row table entry of a row that starts.
    """
    vector = layout.empty.copy()
    sections = split_vector(layout, vector)
    decoding = plan.decoding
    count = len(decoding)
    sections["rows"][:count] = decoding.rows
    if layout.kind == "decode":
        sections["blocks"][:count] = decoding.new_blocks
        if count and layout.window_pool_blocks:
            sections["window_blocks"][:, :count] = decoding.window_blocks
        return vector
    _pack_decoding(decoding, sections)
    _pack_chunks(plan, sections, start_fields)
    if layout.tiles is not None:
        row_starts = np.zeros(layout.num_rows + 1, np.int32)
        np.cumsum(sections["num_tokens"], out=row_starts[1:])
        table = make_tiles(row_starts, layout.num_tokens, layout.tiles)
        sections["tiles"][:] = table.packed
    return vector


def _pack_decoding(decoding: DecodeRows, sections: dict[str, np.ndarray]) -> None:
    """Fills in rows whose token is on the device already."""
    count = len(decoding)
    has_block = decoding.new_blocks != NO_BLOCK
    new_blocks = decoding.new_blocks[has_block]
    sections["num_tokens"][:count] = 1
    sections["samples"][:count] = 1
    sections["first_block"][:count] = decoding.first_blocks
    sections["num_blocks"][:count] = has_block
    sections["blocks"][: len(new_blocks)] = new_blocks
    if count and len(decoding.window_blocks):
        appended = decoding.window_blocks[:, has_block]
        sections["window_blocks"][:, : len(new_blocks)] = appended


def _pack_chunks(
    plan: StepPlan,
    sections: dict[str, np.ndarray],
    start_fields: Callable[[ScheduledRow], np.ndarray],
) -> None:
    """Fills in the other rows, which come after those that decode."""
    first = token = len(plan.decoding)
    block = int(sections["num_blocks"].sum())
    copy = 0
    for i, row in enumerate(plan.chunks, first):
        sections["rows"][i] = row.row
        sections["num_tokens"][i] = row.num_tokens
        sections["samples"][i] = row.samples
        sections["starts"][i] = row.starts
        sections["uploads"][i] = 1
        sections["first_block"][i] = row.first_block
        sections["num_blocks"][i] = len(row.new_blocks)
        sections["tokens"][token : token + len(row.tokens)] = row.tokens
        sections["blocks"][block : block + len(row.new_blocks)] = row.new_blocks
        if row.starts:
            sections["fields"][i] = start_fields(row)
        for group, blocks in enumerate(row.window_blocks):
            sections["window_blocks"][group, block : block + len(blocks)] = blocks
        if row.copy is not None:
            sections["copy_sources"][copy] = row.copy.source
            sections["copy_targets"][copy] = row.copy.target
            for group, each in enumerate(row.window_copies):
                sections["window_sources"][group, copy] = each.source
                sections["window_targets"][group, copy] = each.target
            copy += 1
        token += row.num_tokens
        block += len(row.new_blocks)
