"""The frozen contract between scheduler and engine: what one step computes."""

import dataclasses
from typing import NamedTuple

import numpy as np

NO_BLOCK = -1


@dataclasses.dataclass(frozen=True, slots=True)
class BlockCopy:
    """A block whose content is copied before the step computes (copy on write).

    No block is both a source and a target in one step.
    """

    source: int
    target: int


class ScheduledRow(NamedTuple):
    """The share of one sequence in a step.

    A named tuple, because a dataclass costs four times as much to make.

    Attributes:
        sequence_id: Id of the sequence in the scheduler.
        row: Its row of the device table.
        position: Position of its first token in this step.
        num_tokens: Tokens computed for it in this step.
        tokens: Ids of those tokens; empty when the only token is the one that the row
            sampled in the step before, which is still on the device.
        samples: Whether this step reaches the last known token and samples the next.
        starts: Whether the row must be initialised: it is new, or was preempted.
        first_block: Index in the block table of the first of `new_blocks`.
        new_blocks: Pool blocks appended to the table; all of it when the row starts.
        copy: The copy on write that must precede the step, if any.
        window_blocks: The same appends to the tables of the groups with a window;
            `NO_BLOCK` for what the row does not see.
        window_copies: The same copy in those groups.
    """

    sequence_id: int
    row: int
    position: int
    num_tokens: int
    tokens: tuple[int, ...]
    samples: bool
    starts: bool = False
    first_block: int = 0
    new_blocks: tuple[int, ...] = ()
    copy: BlockCopy | None = None
    window_blocks: tuple[tuple[int, ...], ...] = ()
    window_copies: tuple[BlockCopy, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class DecodeRows:
    """The rows of a step that compute the token they sampled last, as columns.

    Nothing is made per row, since there are hundreds of them in every step.

    Attributes:
        sequence_ids: i64[N] ids of the sequences.
        rows: i32[N] rows of the device table.
        positions: i32[N] position of the token.
        new_blocks: i32[N] block appended to the table, or `NO_BLOCK`.
        are_last: bool[N] whether the token sampled now is the last there is room for.
        block_size: Tokens per block.
        window_blocks: i32[G, N] blocks appended in the groups with a window.
    """

    sequence_ids: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    new_blocks: np.ndarray
    are_last: np.ndarray
    block_size: int
    window_blocks: np.ndarray

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def first_blocks(self) -> np.ndarray:
        """i32[N] index in the block table of the token's block."""
        return self.positions // self.block_size

    def one_by_one(self) -> list[ScheduledRow]:
        """The same, row by row."""
        columns = (
            self.sequence_ids,
            self.rows,
            self.positions,
            self.first_blocks,
            self.new_blocks,
        )
        found: list[ScheduledRow] = []
        windows = self.window_blocks.T.tolist() or [[]] * len(self)
        lists = (column.tolist() for column in columns)
        for (*values, block), others in zip(
            zip(*lists, strict=True), windows, strict=True
        ):
            sequence_id, row, position, first = values
            has_block = block != NO_BLOCK
            found.append(
                ScheduledRow(
                    sequence_id,
                    row,
                    position,
                    1,
                    (),
                    samples=True,
                    first_block=first,
                    new_blocks=(block,) if has_block else (),
                    window_blocks=tuple(
                        (each,) if has_block else () for each in others
                    ),
                )
            )
        return found


_NOTHING = np.zeros(0, np.int32)
NO_WINDOW_BLOCKS = np.zeros((0, 0), np.int32)
"""What is appended in the groups with a window where there are none."""
NO_DECODE_ROWS = DecodeRows(
    sequence_ids=_NOTHING,
    rows=_NOTHING,
    positions=_NOTHING,
    new_blocks=_NOTHING,
    are_last=_NOTHING,
    block_size=1,
    window_blocks=NO_WINDOW_BLOCKS,
)
"""The columns of a step in which no row decodes."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One step: at least one row, `num_tokens` within the token budget.

    The rows of the step are those that decode, then the chunks that sample, then the
    others; no row of the table is there twice.

    Attributes:
        step: Number of the step, counted from 1.
        decoding: The rows that compute the one token that they sampled last.
        chunks: The others: parts of prompts, and what is computed again.
        num_tokens: Sum over the rows.
    """

    step: int
    decoding: DecodeRows
    chunks: tuple[ScheduledRow, ...]
    num_tokens: int

    @property
    def is_decode(self) -> bool:
        """Whether every row computes just the token that it sampled last."""
        return not self.chunks

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.decoding) + len(self.chunks)

    @property
    def table_rows(self) -> list[int]:
        """Rows of the device table, in order."""
        return [*self.decoding.rows.tolist(), *(row.row for row in self.chunks)]

    @property
    def samples(self) -> list[bool]:
        """Whether each row samples a token."""
        return [True] * len(self.decoding) + [row.samples for row in self.chunks]

    @property
    def rows(self) -> tuple[ScheduledRow, ...]:
        """All rows one by one, to look at."""
        return (*self.decoding.one_by_one(), *self.chunks)
