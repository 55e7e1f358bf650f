"""Steps under way, and what their results do to the sequences."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import compress
from operator import attrgetter
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


@dataclasses.dataclass(frozen=True, slots=True)
class StepUpdates:
    """What a committed step did to its sequences.

    Most decode and go on; nothing is made for each of these.

    Attributes:
        places: Place in the plan's rows of each sequence that goes on.
        requests: These sequences.
        token_ids: Their new tokens.
        others: Those that have sampled their first token since they got a row, have
            lost it, or have ended, in the order of the rows.
    """

    places: Sequence[int]
    requests: Sequence[Request]
    token_ids: Sequence[int]
    others: Sequence[SequenceUpdate]

    def one_by_one(self) -> list[SequenceUpdate]:
        """All updates in the order of the rows."""
        columns = zip(self.places, self.requests, self.token_ids, strict=True)
        going_on = [
            SequenceUpdate(request, place, token, None)
            for place, request, token in columns
        ]
        return sorted([*going_on, *self.others], key=attrgetter("plan_index"))


class LaunchedStep(NamedTuple):
    """A plan that is not committed, with the sequences of its rows.

    The number of preemptions at launch tells whether the sequence of a chunk still has
    the blocks that the step wrote to. One that decodes has them while it runs: after a
    preemption it waits for the tokens under way.

    Attributes:
        plan: The plan.
        requests: The sequence of each row.
        chunk_preemptions: How often the sequence of each chunk had been preempted.
        row_preemptions: The same of all rows, in a pipeline; empty elsewhere.
    """

    plan: StepPlan
    requests: list[Request]
    chunk_preemptions: list[int]
    row_preemptions: Sequence[int] = ()

    @classmethod
    def of(
        cls, plan: StepPlan, requests: list[Request], num_stages: int
    ) -> "LaunchedStep":
        """A plan that is launched now.

        Args:
            plan: The plan.
            requests: The sequence of each row.
            num_stages: Stages that it goes through.
        """
        chunks = requests[len(plan.decoding) :]
        counts = [request.num_preemptions for request in chunks]
        if num_stages == 1:
            return cls(plan, requests, counts)
        rows = [request.num_preemptions for request in requests]
        return cls(plan, requests, counts, rows)

    @property
    def lost(self) -> frozenset[int]:
        """Places of the rows whose sequence was preempted since, in a pipeline.

        There nobody waits for tokens of a row that is lost: they are computed again.
        """
        if not self.row_preemptions:
            return frozenset()
        rows = zip(self.requests, self.row_preemptions, strict=True)
        return frozenset(
            i
            for i, (request, count) in enumerate(rows)
            if request.num_preemptions != count
        )

    def updates(
        self,
        token_ids: Sequence[int],
        others: Sequence[SequenceUpdate],
        looked_at: Iterable[int],
    ) -> StepUpdates:
        """Puts together the updates.

        Args:
            token_ids: The token of each row.
            others: Updates of the rows that were looked at one by one.
            looked_at: Places of these rows.
        """
        goes_on = [True] * len(self.requests)
        for index in looked_at:
            goes_on[index] = False
        return StepUpdates(
            places=list(compress(range(len(goes_on)), goes_on)),
            requests=list(compress(self.requests, goes_on)),
            token_ids=list(compress(token_ids, goes_on)),
            others=others,
        )

    def may_end(self, suspects: Iterable[int]) -> list[bool]:
        """Whether a row has to be looked at: it is a chunk, or its token may be last.

        Args:
            suspects: Places of rows that have to be looked at anyway.
        """
        decoding = self.plan.decoding.are_last.tolist()
        checks = decoding + [True] * len(self.plan.chunks)
        for index in suspects:
            checks[index] = True
        return checks

    def samples(self, index: int) -> bool:
        """Whether the row at this place has sampled a token."""
        chunk = index - len(self.plan.decoding)
        return chunk < 0 or self.plan.chunks[chunk].samples

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
