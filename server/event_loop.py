"""The event loop of the server: its turns are bounded, and their lengths are counted.

A turn serves every socket that is ready. With thousands of requests at once that takes
a second, in which no stream gets a token and no health check an answer. Here a turn
serves a few dozen sockets; the kernel gives the others next, in the order in which they
became ready, so that none starves.
"""

import asyncio
import os
import selectors
import sys
import time

from server.histogram import Counts

SOCKETS_PER_TURN = 32
"""Sockets served in one turn; a request costs less than a millisecond of it."""
CONNECTIONS_PER_TURN = 32
"""Connections accepted in one turn."""
TURN_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds."""


class Turns:
    """How long the turns of an event loop are.

    Nothing that has become ready waits longer for its turn than the turn before lasts.

    Attributes:
        seconds: Their lengths.
        longest: The longest of them.
    """

    def __init__(self) -> None:
        """Has seen none."""
        self.seconds = Counts(TURN_BOUNDS)
        self.longest = 0.0
        self._began: float | None = None

    def begin(self) -> None:
        """Notes that the loop has something to do."""
        self._began = time.monotonic()

    def end(self) -> None:
        """Notes that the loop looks for something to do."""
        if self._began is not None:
            seconds = time.monotonic() - self._began
            self.seconds.add(seconds)
            self.longest = max(self.longest, seconds)


class CountingSelector(selectors.DefaultSelector):
    """Tells when turns begin and end."""

    def __init__(self, turns: Turns) -> None:
        """Takes what counts them."""
        super().__init__()
        self._turns = turns

    def select(
        self, timeout: float | None = None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        """Waits for sockets that are ready."""
        self._turns.end()
        ready = self._find_ready(timeout)
        self._turns.begin()
        return ready

    def _find_ready(
        self, timeout: float | None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(timeout)


if sys.platform == "linux":
    import select

    class FairSelector(CountingSelector):
        """Gives some of the sockets that are ready, and the others when asked again."""

        def __init__(self, turns: Turns, most: int = SOCKETS_PER_TURN) -> None:
            """Bounds what is given at once.

            Args:
                turns: Counts the turns.
                most: Most sockets at once.
            """
            super().__init__(turns)
            self._most = most
            # The same set under a number of its own: each object closes its own.
            self._epoll = select.epoll.fromfd(os.dup(self.fileno()))

        def close(self) -> None:
            """Closes both handles."""
            self._epoll.close()
            super().close()

        def _find_ready(
            self, timeout: float | None
        ) -> list[tuple[selectors.SelectorKey, int]]:
            wait = -1 if timeout is None else max(timeout, 0)
            found: list[tuple[selectors.SelectorKey, int]] = []
            for handle, events in self._epoll.poll(wait, self._most):
                key = self.get_map().get(handle)
                if key is None:  # closed without being taken out
                    continue
                # An error or a hang-up is found by whoever reads or writes.
                readable = events & ~select.EPOLLOUT and selectors.EVENT_READ
                writable = events & ~select.EPOLLIN and selectors.EVENT_WRITE
                found.append((key, key.events & (readable | writable)))
            return found

    def make_selector(turns: Turns) -> CountingSelector:
        """A selector with bounded turns."""
        return FairSelector(turns)

else:

    def make_selector(turns: Turns) -> CountingSelector:
        """Turns are not bounded here."""
        return CountingSelector(turns)


def make_event_loop(turns: Turns) -> asyncio.AbstractEventLoop:
    """An event loop whose turns are counted, and bounded where the system can."""
    return asyncio.SelectorEventLoop(make_selector(turns))
