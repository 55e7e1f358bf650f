"""A plan in the making."""

from collections.abc import Sequence

from jllm.config import SchedulerConfig
from jllm.scheduler.block_tables import Match
from jllm.scheduler.plan import (
    NO_DECODE_ROWS,
    BlockCopy,
    DecodeRows,
    ScheduledRow,
    StepPlan,
)
from jllm.scheduler.request import Request


class Draft:
    """Collects the rows of a step and keeps what is left of each limit.

    Attributes:
        step: Number of the step.
        tokens_left: Tokens that can still be planned.
        appends_left: Entries of block tables that can still be sent.
        copies_left: Block copies that can still be sent.
        num_starts: Rows that start in this step.
        first_samples: Sequences that sample for the first time since they started.
    """

    __slots__ = (
        "_budget",
        "_chunks",
        "_decode_requests",
        "_decoding",
        "appends_left",
        "copies_left",
        "first_samples",
        "num_starts",
        "step",
        "tokens_left",
    )

    def __init__(
        self, config: SchedulerConfig, step: int, token_limit: int | None = None
    ) -> None:
        """Starts without rows.

        Args:
            config: The limits.
            step: Number of the step.
            token_limit: Most tokens, if fewer than the budget.
        """
        self.step = step
        budget = config.token_budget
        self._budget = budget if token_limit is None else min(budget, token_limit)
        self.tokens_left = self._budget
        self.appends_left = config.max_block_appends
        self.copies_left = config.max_block_copies
        self.num_starts = 0
        self.first_samples: list[Request] = []
        self._decoding = NO_DECODE_ROWS
        self._decode_requests: Sequence[Request] = ()
        self._chunks: list[tuple[ScheduledRow, Request]] = []

    @property
    def requests(self) -> list[Request]:
        """The sequence of each row, in the order of the plan."""
        chunks = [request for _, request in self._ordered_chunks()]
        return [*self._decode_requests, *chunks]

    def _ordered_chunks(self) -> list[tuple[ScheduledRow, Request]]:
        return sorted(self._chunks, key=lambda chunk: not chunk[0].samples)

    def set_decoding(self, rows: DecodeRows, requests: Sequence[Request]) -> None:
        """Sets the rows that decode; their blocks have been counted."""
        self._decoding, self._decode_requests = rows, requests
        self.tokens_left -= len(rows)

    def add_chunk(
        self, request: Request, count: int, new_blocks: tuple[int, ...]
    ) -> None:
        """Adds tokens of a running sequence, whose table ends with the new blocks."""
        position = request.num_computed_tokens
        end = position + count
        first_block = len(request.block_ids) - len(new_blocks)
        row = ScheduledRow(
            request.sequence_id,
            request.row,
            position,
            count,
            tuple(request.token_ids[position:end]),
            samples=end == request.num_tokens,
            first_block=first_block,
            new_blocks=new_blocks,
            window_blocks=tuple(
                tuple(table.blocks[first_block:]) for table in request.tables[1:]
            ),
        )
        self._add(request, row)

    def add_start(self, request: Request, count: int, match: Match) -> None:
        """Adds a sequence that has just got its row and the blocks for the step."""
        position = match.num_tokens
        end = position + count
        copies = _copies(request, match)
        self.copies_left -= bool(copies)
        tables = tuple(tuple(table.blocks) for table in request.tables)
        row = ScheduledRow(
            request.sequence_id,
            request.row,
            position,
            count,
            tuple(request.token_ids[position:end]),
            samples=end == request.num_tokens,
            starts=True,
            new_blocks=tables[0],
            copy=copies[0] if copies else None,
            window_blocks=tables[1:],
            window_copies=copies[1:],
        )
        self.num_starts += 1
        self._add(request, row)

    def _add(self, request: Request, row: ScheduledRow) -> None:
        self._chunks.append((row, request))
        self.tokens_left -= row.num_tokens
        self.appends_left -= len(row.new_blocks)
        request.num_computed_tokens += row.num_tokens
        if row.samples:
            request.first_sample_step = self.step
            self.first_samples.append(request)

    def plan(self) -> StepPlan | None:
        """Makes the plan, None without rows."""
        num_tokens = self._budget - self.tokens_left
        if not num_tokens:
            return None
        chunks = tuple(row for row, _ in self._ordered_chunks())
        return StepPlan(self.step, self._decoding, chunks, num_tokens)


def _copies(request: Request, match: Match) -> tuple[BlockCopy, ...]:
    """The copy of a shared block in each group: into the block that follows."""
    target = len(match.blocks)
    return tuple(
        BlockCopy(part.source, table.blocks[target])
        for part, table in zip((match, *match.windows), request.tables, strict=True)
        if part.source is not None
    )
