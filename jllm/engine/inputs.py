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
from jllm.scheduler.plan import ScheduledRow, StepPlan

NO_BLOCK = -1


class DecodeInput(NamedTuple):
    """Input of a decode step: one token per row, the one that it sampled last.

    Attributes:
        rows: Row of the table; ids past the table mark padding, all distinct.
        blocks: Block appended to the row's table in this step, or `NO_BLOCK`.
    """

    rows: Int[Array, " S"]
    blocks: Int[Array, " S"]


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
    """

    kind: Literal["prefill", "decode"]
    num_rows: int
    num_tokens: int
    table_rows: int
    num_pool_blocks: int
    max_appends: int
    max_copies: int

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each section of the vector, in order."""
        rows = (self.num_rows,)
        if self.kind == "decode":
            return {"rows": rows, "blocks": rows}
        return {
            **dict.fromkeys(PrefillInput._fields[:7], rows),
            "fields": (self.num_rows, NUM_FIELDS),
            "copy_sources": (self.max_copies,),
            "copy_targets": (self.max_copies,),
            "blocks": (self.max_appends,),
            "tokens": (self.num_tokens,),
        }

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
    vector = np.zeros(layout.size, np.int32)
    sections = split_vector(layout, vector)
    rows = plan.rows
    sections["rows"][:] = np.arange(layout.num_rows) + layout.table_rows
    sections["rows"][: len(rows)] = [row.row for row in rows]
    if layout.kind == "decode":
        blocks = sections["blocks"]
        blocks[:] = NO_BLOCK
        blocks[: len(rows)] = [
            row.new_blocks[0] if row.new_blocks else NO_BLOCK for row in rows
        ]
        return vector
    _pack_prefill(plan, layout, sections, start_fields)
    return vector


def _pack_prefill(
    plan: StepPlan,
    layout: InputLayout,
    sections: dict[str, np.ndarray],
    start_fields: Callable[[ScheduledRow], np.ndarray],
) -> None:
    targets = sections["copy_targets"]
    targets[:] = np.arange(layout.max_copies) + layout.num_pool_blocks
    token, block, copy = 0, 0, 0
    for i, row in enumerate(plan.rows):
        sections["num_tokens"][i] = row.num_tokens
        sections["samples"][i] = row.samples
        sections["starts"][i] = row.starts
        sections["uploads"][i] = bool(row.tokens)
        sections["first_block"][i] = row.first_block
        sections["num_blocks"][i] = len(row.new_blocks)
        sections["tokens"][token : token + len(row.tokens)] = row.tokens
        sections["blocks"][block : block + len(row.new_blocks)] = row.new_blocks
        if row.starts:
            sections["fields"][i] = start_fields(row)
        if row.copy is not None:
            sections["copy_sources"][copy] = row.copy.source
            targets[copy] = row.copy.target
            copy += 1
        token += row.num_tokens
        block += len(row.new_blocks)
