"""The sequences that wait for a row, in the order of their turn."""

import heapq

from jllm.scheduler.request import Request


class WaitingQueue:
    """A heap in which ended sequences stay until they come up, or are too many."""

    def __init__(self) -> None:
        """Starts empty."""
        self._heap: list[tuple[tuple[int, int, int], Request]] = []
        self._num_ended = 0

    def push(self, request: Request) -> None:
        """Queues a sequence; its order is unique, so that requests never compare."""
        heapq.heappush(self._heap, (request.order, request))

    def peek(self) -> Request | None:
        """Finds the sequence whose turn it is."""
        while self._heap:
            request = self._heap[0][1]
            if not request.is_finished:
                return request
            heapq.heappop(self._heap)
            self._num_ended -= 1
        return None

    def pop(self) -> Request:
        """Takes what `peek` found."""
        return heapq.heappop(self._heap)[1]

    def requests(self) -> list[Request]:
        """Lists the queued sequences that have not ended, in no particular order."""
        return [entry[1] for entry in self._heap if not entry[1].is_finished]

    def note_ended(self) -> None:
        """Counts a queued sequence that has ended; clears away when half have."""
        self._num_ended += 1
        if 2 * self._num_ended > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[1].is_finished]
            heapq.heapify(self._heap)
            self._num_ended = 0
