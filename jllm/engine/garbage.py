"""Python's garbage collector, kept from stopping a step."""

import gc
import time
from types import TracebackType

YOUNG_EVERY = 500
"""Steps after which the objects made since are looked through, in about a
millisecond."""
FULL_EVERY = 10.0
"""Seconds between two full collections in idle moments."""
FULL_AT_LATEST = 300.0
"""Seconds after which a full collection is made though there is no idle moment."""


class QuietGarbage:
    """While it is entered, garbage is collected where nobody waits for it.

    A collection that Python starts by itself looks through all objects of the process,
    which takes a tenth of a second, in the middle of a step. Here the collector is off.
    Every few hundred steps the young objects are looked through, while the device
    computes; all of them when there is nothing to do, or after minutes without such a
    moment. The collector is the whole process's: it is left as it was found.

    Args:
        freeze: Whether what is alive at the beginning is never looked through again.
    """

    def __init__(self, *, freeze: bool) -> None:
        """Changes nothing yet."""
        self._freezes = freeze
        self._was_enabled = False
        self._num_steps = 0
        self._last_full = 0.0

    def __enter__(self) -> "QuietGarbage":
        self._was_enabled = gc.isenabled()
        self._last_full = time.monotonic()
        gc.disable()
        if self._freezes:
            gc.freeze()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._freezes:
            gc.unfreeze()
        # If it was off, another engine has turned it off and will turn it on.
        if self._was_enabled:
            gc.enable()

    def note_step(self) -> None:
        """To be called when a step has been launched and the last one's tokens read."""
        self._num_steps += 1
        if self._num_steps % YOUNG_EVERY == 0:
            now = time.monotonic()
            is_late = now - self._last_full > FULL_AT_LATEST
            if is_late:
                self._last_full = now
            gc.collect(2 if is_late else 1)

    def note_idle(self) -> None:
        """To be called when there is nothing to do."""
        now = time.monotonic()
        if self._num_steps and now - self._last_full > FULL_EVERY:
            self._last_full, self._num_steps = now, 0
            gc.collect()
