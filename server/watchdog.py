"""Tells a long step from a stalled engine; queues no work and waits for nothing."""

import time


class Watchdog:
    """Watches the count of steps: with work to do it must not stand still."""

    def __init__(self, stall_timeout: float) -> None:
        """Starts the clock."""
        self._stall_timeout = stall_timeout
        self._num_steps = -1
        self._progress = time.monotonic()

    @property
    def seconds_still(self) -> float:
        """How long no step has ended, or nothing has been to do."""
        return time.monotonic() - self._progress

    @property
    def is_stalled(self) -> bool:
        """Whether steps should have ended long ago."""
        return self.seconds_still > self._stall_timeout

    def note(self, num_steps: int, *, is_busy: bool) -> None:
        """Takes the count of steps; idleness counts as progress."""
        if num_steps != self._num_steps or not is_busy:
            self._num_steps = num_steps
            self._progress = time.monotonic()
