"""Steps under way, and what their results do to the sequences."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from jllm.scheduler.plan import StepPlan
from jllm.scheduler.request import Request, RequestStatus
from jllm.types import FinishReason


class SequenceUpdate(NamedTuple):
    """What a committed step did to one sequence.

    Attributes:
        request: The sequence.
        plan_index: Its place in the plan's rows.
        token_id: Its new token, None if it failed.
        finish_reason: Why it has ended; None if it goes on.
    """

    request: Request
    plan_index: int
    token_id: int | None
    finish_reason: FinishReason | None


class LaunchedStep(NamedTuple):
    """A plan that is not committed, with the sequences of its rows.

    The number of preemptions at launch tells whether the sequence of a chunk still has
    the blocks that the step wrote to. One that decodes has them while it runs: after a
    preemption it waits for the tokens under way.

    Attributes:
        plan: The plan.
        requests: The sequence of each row.
        chunk_preemptions: How often the sequence of each chunk had been preempted.
    """

    plan: StepPlan
    requests: list[Request]
    chunk_preemptions: list[int]

    def may_end(self, complete: Collection[int]) -> list[bool]:
        """Whether each row's token may be its last, or for a chunk is there at all."""
        ends = self.plan.decoding.are_last.tolist()
        for index in complete:
            if index < len(ends):
                ends[index] = True
        return ends + [row.samples for row in self.plan.chunks]

    def computed(
        self, block_size: int, failed: Collection[int]
    ) -> Iterator[tuple[Request, int]]:
        """Sequences that may have filled a block, with their length in the pool.

        Args:
            block_size: Tokens per block.
            failed: Places of the rows whose blocks hold nothing of use.
        """
        requests, lengths = self.requests, self.plan.decoding.positions + 1
        for index in np.flatnonzero(lengths % block_size == 0).tolist():
            request = requests[index]
            if request.status is RequestStatus.RUNNING and index not in failed:
                yield request, int(lengths[index])
        chunks = zip(self.plan.chunks, self.chunk_preemptions, strict=True)
        for index, (row, num_preemptions) in enumerate(chunks, len(lengths)):
            request = requests[index]
            has_ended = request.is_finished or index in failed
            if not has_ended and request.num_preemptions == num_preemptions:
                yield request, row.position + row.num_tokens
