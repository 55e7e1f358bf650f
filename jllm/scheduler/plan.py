"""The frozen contract between scheduler and engine: what one step computes."""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, slots=True)
class BlockCopy:
    """A block whose content is copied before the step computes (copy on write).

    No block is both a source and a target in one step.
    """

    source: int
    target: int


class ScheduledRow(NamedTuple):
    """The share of one sequence in a step.

    A named tuple, because one is made per row and step and a dataclass costs four times
    as much.

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


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: at least one row, `num_tokens` within the token budget.

    Attributes:
        step: Number of the step, counted from 1.
        rows: The scheduled rows, each row of the table at most once.
        num_tokens: Sum over the rows.
    """

    step: int
    rows: tuple[ScheduledRow, ...]
    num_tokens: int

    @property
    def is_decode(self) -> bool:
        """Whether every row computes just the token that it sampled last."""
        return all(not row.tokens for row in self.rows)
