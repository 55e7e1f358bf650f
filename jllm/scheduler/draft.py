"""A plan in the making."""

from jllm.config import SchedulerConfig
from jllm.scheduler.block_tables import Match
from jllm.scheduler.plan import BlockCopy, ScheduledRow, StepPlan
from jllm.scheduler.request import Request


class Draft:
    """Collects the rows of a step and keeps what is left of each limit.

    Attributes:
        step: Number of the step.
        tokens_left: Tokens that can still be planned.
        appends_left: Entries of block tables that can still be sent.
        copies_left: Block copies that can still be sent.
        num_starts: Rows that start in this step.
        requests: The sequence of each row.
        first_samples: Sequences that sample for the first time since they started.
    """

    __slots__ = (
        "_budget",
        "_rows",
        "appends_left",
        "copies_left",
        "first_samples",
        "num_starts",
        "requests",
        "step",
        "tokens_left",
    )

    def __init__(self, config: SchedulerConfig, step: int) -> None:
        """Starts without rows."""
        self.step = step
        self.tokens_left = self._budget = config.token_budget
        self.appends_left = config.max_block_appends
        self.copies_left = config.max_block_copies
        self.num_starts = 0
        self.requests: list[Request] = []
        self.first_samples: list[Request] = []
        self._rows: list[ScheduledRow] = []

    def add(self, request: Request, count: int, new_blocks: tuple[int, ...]) -> None:
        """Adds a running sequence, whose table ends with the new blocks."""
        on_device = request.first_sample_step > 0
        position = request.num_computed_tokens
        end = position + count
        row = ScheduledRow(
            request.sequence_id,
            request.row,
            position,
            count,
            () if on_device else tuple(request.token_ids[position:end]),
            end == len(request.token_ids) + request.num_pending,
            False,
            len(request.block_ids) - len(new_blocks),
            new_blocks,
        )
        self._add(request, row)

    def add_start(self, request: Request, count: int, match: Match) -> None:
        """Adds a sequence that has just got its row and the blocks for the step."""
        position = match.num_tokens
        end = position + count
        target = request.block_ids[len(match.blocks)]
        copy = None
        if match.source is not None:
            copy = BlockCopy(match.source, target)
            self.copies_left -= 1
        row = ScheduledRow(
            request.sequence_id,
            request.row,
            position,
            count,
            tuple(request.token_ids[position:end]),
            samples=end == request.num_tokens,
            starts=True,
            new_blocks=tuple(request.block_ids),
            copy=copy,
        )
        self.num_starts += 1
        self._add(request, row)

    def _add(self, request: Request, row: ScheduledRow) -> None:
        self._rows.append(row)
        self.requests.append(request)
        self.tokens_left -= row.num_tokens
        self.appends_left -= len(row.new_blocks)
        request.num_computed_tokens += row.num_tokens
        if row.samples:
            request.num_pending += 1
            if not request.first_sample_step:
                request.first_sample_step = self.step
                self.first_samples.append(request)

    def plan(self) -> StepPlan | None:
        """Makes the plan, None without rows."""
        if not self._rows:
            return None
        return StepPlan(self.step, tuple(self._rows), self._budget - self.tokens_left)
