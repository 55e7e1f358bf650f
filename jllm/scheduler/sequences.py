"""Who waits, who runs on which row, and whose turn it is."""

import heapq
from bisect import insort
from collections.abc import Sequence
from operator import attrgetter

from jllm.errors import InvalidRequestError
from jllm.scheduler.queue import WaitingQueue
from jllm.scheduler.request import Request, RequestStatus
from jllm.types import FinishReason


class Sequences:
    """Owns the sequences that have not ended, and the rows of the device table.

    A fork waits aside until the prompt of its parent has been computed or the parent
    has lost it; only then it joins the queue.
    """

    def __init__(self, num_rows: int) -> None:
        """Starts without sequences, all rows free."""
        self._num_rows = num_rows
        self._free_rows = list(range(num_rows))
        self._waiting = WaitingQueue()
        self._running: list[Request] = []
        self._unfinished: dict[int, Request] = {}
        self._by_request: dict[str, dict[int, Request]] = {}
        self._forks: dict[int, dict[int, Request]] = {}
        """By the parent's id: its forks that wait aside."""

    def __len__(self) -> int:
        """Number of sequences that have not ended."""
        return len(self._unfinished)

    @property
    def running(self) -> list[Request]:
        """Those that have a row, in the order of their turn."""
        return self._running

    @property
    def has_free_row(self) -> bool:
        """Whether another sequence could run."""
        return bool(self._free_rows)

    def get(self, sequence_id: int) -> Request:
        """Finds a sequence that has not ended; raises KeyError for others."""
        return self._unfinished[sequence_id]

    def of_request(self, request_id: str) -> list[Request]:
        """Lists the sequences of a request that have not ended."""
        return list(self._by_request.get(request_id, {}).values())

    def add(self, request: Request) -> None:
        """Takes in a new sequence; raises InvalidRequestError if its id is in use."""
        if request.sequence_id in self._unfinished:
            raise InvalidRequestError(
                f"sequence_id={request.sequence_id} is in use", parameter="request_id"
            )
        self._unfinished[request.sequence_id] = request
        siblings = self._by_request.setdefault(request.request_id, {})
        siblings[request.sequence_id] = request
        parent = request.fork_of
        if parent is None or parent.is_finished or parent.first_sample_step:
            self._waiting.push(request)
        else:
            forks = self._forks.setdefault(parent.sequence_id, {})
            forks[request.sequence_id] = request

    def next_waiting(self) -> Request | None:
        """Finds the sequence at the head of the queue, which stays there."""
        return self._waiting.peek()

    def start_next(self) -> None:
        """Gives the sequence at the head of the queue a row."""
        request = self._waiting.pop()
        request.status = RequestStatus.RUNNING
        request.row = heapq.heappop(self._free_rows)
        insort(self._running, request, key=attrgetter("order"))

    def preempt(self, request: Request) -> None:
        """Takes the row from a running sequence and queues it again."""
        self._leave_row(request)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self._waiting.push(request)
        self.queue_forks(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a sequence, wherever it stands."""
        status, request.status = request.status, RequestStatus.FINISHED
        request.finish_reason = reason
        if status is RequestStatus.RUNNING:
            self._leave_row(request)
        elif not self._leave_parent(request):
            self._waiting.note_ended()
        self.queue_forks(request)
        del self._unfinished[request.sequence_id]
        siblings = self._by_request[request.request_id]
        del siblings[request.sequence_id]
        if not siblings:
            del self._by_request[request.request_id]

    def queue_forks(self, parent: Request) -> None:
        """Queues the forks that have waited for a sequence."""
        for fork in self._forks.pop(parent.sequence_id, {}).values():
            self._waiting.push(fork)

    def _leave_row(self, request: Request) -> None:
        self._running.remove(request)
        heapq.heappush(self._free_rows, request.row)
        request.row = -1
        request.num_computed_tokens = 0
        request.first_sample_step = 0

    def _leave_parent(self, request: Request) -> bool:
        parent = request.fork_of
        if parent is None:
            return False
        forks = self._forks.get(parent.sequence_id, {})
        return forks.pop(request.sequence_id, None) is not None

    def check_integrity(self) -> None:
        """Raises AssertionError unless every sequence and row has exactly one place."""
        orders = [request.order for request in self._running]
        assert orders == sorted(orders), "the running are out of order"
        rows = [request.row for request in self._running] + self._free_rows
        assert sorted(rows) == list(range(self._num_rows)), "a row is lost or shared"
        places = _ids(self._running) + _ids(self._waiting.requests())
        for forks in self._forks.values():
            places += forks
        assert sorted(places) == sorted(self._unfinished), "a sequence is lost"
        siblings = [i for group in self._by_request.values() for i in group]
        assert sorted(siblings) == sorted(places), "a request lost a sequence"


def _ids(requests: Sequence[Request]) -> list[int]:
    return [request.sequence_id for request in requests]
