"""Who may come in: a queue bounded by sequences and tokens."""

import asyncio
import collections
import math
import time
from typing import NoReturn

from server.errors import overloaded

MAX_RETRY_SECONDS = 60
RATE_WINDOW = 256
"""Departures from which the speed of the queue is estimated."""


class Admission:
    """Counts the sequences that wait for their first token, and all open requests.

    A request larger than the bounds is let in while nothing waits, or it never would.
    """

    def __init__(self, max_sequences: int, max_tokens: int) -> None:
        """Starts empty."""
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._departures: collections.deque[tuple[float, int]] = collections.deque(
            maxlen=RATE_WINDOW
        )
        self._num_departed = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_queued = 0
        self.num_queued_tokens = 0
        self.num_open = 0
        self.num_rejected = 0

    def check_room(self) -> None:
        """Refuses early: a full queue has no room, whatever is asked for.

        Raises:
            ApiError: The queue is full; says when to try again.
        """
        if (
            self.num_queued >= self._max_sequences
            or self.num_queued_tokens >= self._max_tokens
        ):
            self._reject()

    def reserve(self, num_sequences: int, num_tokens: int) -> "Slot":
        """Takes a place in the queue for a request whose tokens are estimated.

        Raises:
            ApiError: The queue is full; says when to try again.
        """
        if self.num_queued and (
            self.num_queued + num_sequences > self._max_sequences
            or self.num_queued_tokens + num_tokens > self._max_tokens
        ):
            self._reject()
        self.num_open += 1
        self._idle.clear()
        return Slot(self, num_sequences, num_tokens)

    async def wait_idle(self) -> None:
        """Returns when no request is open."""
        await self._idle.wait()

    def move(self, num_sequences: int, num_tokens: int) -> None:
        """Changes what waits; negative numbers leave the queue."""
        self.num_queued += num_sequences
        self.num_queued_tokens += num_tokens
        if num_sequences < 0:
            if len(self._departures) == RATE_WINDOW:
                self._num_departed -= self._departures[0][1]
            self._departures.append((time.monotonic(), -num_sequences))
            self._num_departed -= num_sequences

    def leave(self) -> None:
        """Counts the end of a request."""
        self.num_open -= 1
        if not self.num_open:
            self._idle.set()

    def _reject(self) -> NoReturn:
        self.num_rejected += 1
        raise overloaded(self._retry_after())

    def _retry_after(self) -> int:
        """Seconds until the queue has gone, at the speed of the last departures."""
        if len(self._departures) < 2:
            return 1
        seconds = time.monotonic() - self._departures[0][0]
        count = self._num_departed
        wait = math.ceil(self.num_queued * seconds / count)
        return min(max(wait, 1), MAX_RETRY_SECONDS)


class Slot:
    """The place of one request."""

    def __init__(
        self, admission: Admission, num_sequences: int, num_tokens: int
    ) -> None:
        """Made by `Admission.reserve`."""
        self._admission = admission
        self._num_sequences = num_sequences
        self._num_tokens = num_tokens
        self._is_open = True
        admission.move(num_sequences, num_tokens)

    @property
    def is_queued(self) -> bool:
        """Whether its first token is awaited."""
        return self._num_sequences > 0

    def settle(self, num_tokens: int) -> None:
        """Replaces the estimate by the count."""
        if self.is_queued:
            self._admission.move(0, num_tokens - self._num_tokens)
            self._num_tokens = num_tokens

    def start(self) -> None:
        """Leaves the queue: the first token is there; may be called again."""
        if self.is_queued:
            self._admission.move(-self._num_sequences, -self._num_tokens)
            self._num_sequences = self._num_tokens = 0

    def release(self) -> None:
        """Leaves altogether; may be called again."""
        self.start()
        if self._is_open:
            self._is_open = False
            self._admission.leave()
