"""How all hosts end together when one of them fails."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

logger = logging.getLogger("jllm")

FAILED = 70
"""Exit code of a host that ends because one of them has failed."""


def exit_process(reason: str) -> NoReturn:
    """Ends the process at once: a thread of it may hang inside a collective."""
    logger.error("%s; all hosts end", reason)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(FAILED)


def every(
    seconds: float, call: Callable[[float], None], stopped: threading.Event, name: str
) -> None:
    """Calls a function again and again, in a thread of its own.

    Time that the whole process was suspended does not count: a host that wakes up must
    not take the others for dead before it has listened.

    Args:
        seconds: Between two calls.
        call: Takes the seconds since the last call, at most twice as many as planned.
        stopped: Ends the thread.
        name: Of the thread.
    """

    def run() -> None:
        last = time.monotonic()
        while not stopped.wait(seconds):
            now = time.monotonic()
            call(min(now - last, 2 * seconds))
            last = now

    start_thread(run, name)


def start_thread(run: Callable[[], None], name: str) -> None:
    """Starts a thread that does not keep the process alive."""
    threading.Thread(target=run, name=name, daemon=True).start()
