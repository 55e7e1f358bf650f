"""Finds the host that hung: policy alone, without clocks, threads or connections."""

import collections
import dataclasses
import threading
from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Awaited(Protocol):
    """An array that may not be computed yet."""

    def is_ready(self) -> bool:
        """Whether it is."""
        ...


class Progress:
    """Counts the calls that this host has launched, and those its devices have done."""

    def __init__(self) -> None:
        """Starts at zero."""
        self._lock = threading.Lock()
        self._launched = self._done = 0
        self._awaited: collections.deque[tuple[int, Awaited]] = collections.deque()

    def note(self, number: int, result: Awaited | None) -> None:
        """Takes the last call launched and what it computes; None is done already."""
        with self._lock:
            self._launched = number
            if result is not None:
                self._awaited.append((number, result))
            self._poll()

    def read(self) -> tuple[int, int]:
        """The last call launched, and the last one done."""
        with self._lock:
            self._poll()
            return self._launched, self._done

    def _poll(self) -> None:
        # Results are let go as soon as they are there: they may be large.
        while self._awaited and self._awaited[0][1].is_ready():
            self._awaited.popleft()
        self._done = self._awaited[0][0] - 1 if self._awaited else self._launched


@dataclasses.dataclass(slots=True)
class HostStatus:
    """What was last heard of a host.

    Attributes:
        launched: Number of the last call that it has launched.
        done: Number of the last call that its devices have computed.
        is_compiling: Whether it waits for a program to be compiled.
        silent: Seconds since it was heard.
    """

    launched: int = 0
    done: int = 0
    is_compiling: bool = False
    silent: float = 0.0


class Watch:
    """Tells that a host is dead, hung or stuck, and which.

    All hosts must run the calls that the first one has asked for. One that is heard,
    but does not move on, is found by how far it has come: the others wait for it.

    Args:
        timeout: Seconds without a sign of life, or without progress.
        hosts: Ids of those that are watched.
    """

    def __init__(self, timeout: float, hosts: Sequence[int]) -> None:
        """Begins with nothing asked."""
        self._timeout = timeout
        self._hosts = {host: HostStatus() for host in hosts}
        self._lock = threading.Lock()
        self._last: object = None
        self._still = 0.0

    def hear(self, host: int) -> None:
        """Notes a sign of life."""
        with self._lock:
            self._hosts[host].silent = 0.0

    def report(
        self, host: int, launched: int, done: int, *, is_compiling: bool
    ) -> None:
        """Notes how far a host has come."""
        with self._lock:
            self._hosts[host] = HostStatus(launched, done, is_compiling)

    def tick(self, seconds: float, asked: int = 0) -> str | None:
        """Lets time pass; returns what is wrong, naming the host.

        Args:
            seconds: Time since the last tick.
            asked: Number of the last call that was asked for.
        """
        with self._lock:
            for host, status in self._hosts.items():
                status.silent += seconds
                if status.silent > self._timeout:
                    return f"host {host} has not been heard for {self._timeout:g} s"
            return self._find_stuck(seconds, asked)

    def _find_stuck(self, seconds: float, asked: int) -> str | None:
        all_status = self._hosts.values()
        state = [asked, *((s.launched, s.done, s.is_compiling) for s in all_status)]
        is_waiting = any(status.done < asked for status in all_status)
        is_compiling = any(status.is_compiling for status in all_status)
        if state != self._last or not is_waiting or is_compiling:
            self._last, self._still = state, 0.0
            return None
        self._still += seconds
        if self._still <= self._timeout:
            return None
        launched = min(status.launched for status in all_status)
        field = "launched" if launched < asked else "done"
        least = min(getattr(status, field) for status in all_status)
        stuck = [h for h, s in self._hosts.items() if getattr(s, field) == least]
        verb = "launched" if field == "launched" else "computed"
        names = ", ".join(map(str, stuck))
        return (
            f"host {names} has {verb} call {least} of {asked} and not moved on for "
            f"{self._timeout:g} s"
        )
