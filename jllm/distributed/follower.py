"""The other hosts' side: what the first one tells them, and signs of life for it."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

from jllm.config import HostConfig
from jllm.distributed.channel import Channel, ChannelClosedError
from jllm.distributed.ending import every, exit_process, start_thread
from jllm.distributed.leader import Key
from jllm.distributed.messages import MessageError
from jllm.distributed.watch import Progress, Watch

LEADER = 0
"""Id of the host that schedules."""


class Follower:
    """Receives the calls that the first host makes, and reports how far this one is.

    Args:
        config: The hosts.
        channel: Connection to the first.
        end_process: Ends this process.
    """

    def __init__(
        self,
        config: HostConfig,
        channel: Channel,
        end_process: Callable[[str], Any] = exit_process,
    ) -> None:
        """Starts the threads that listen and send."""
        self._config, self._channel = config, channel
        self._end_process = end_process
        self._progress = Progress()
        self._watch = Watch(config.timeout, [LEADER])
        self._is_compiling: Callable[[], bool] = bool
        self._orders: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._num_calls = 0
        self._closed = threading.Event()
        start_thread(self._listen, "jllm-host-0")
        # Two threads: a first host that takes nothing must not stop the watch.
        every(config.heartbeat, self._pulse, self._closed, "jllm-pulse-0")
        every(config.heartbeat, self._look, self._closed, "jllm-watch")

    def orders(self) -> Generator[list[Any]]:
        """Messages of the first host as they come, until it wants no more."""
        while (order := self._orders.get())[0] != "stop":
            yield order
        self._send("stopped")
        # The job may still fail on another host.
        self._closed.wait(self._config.timeout)
        self._closed.set()
        self._channel.close()

    def watch_compiling(self, is_compiling: Callable[[], bool]) -> None:
        """Takes how to see whether this host waits for a program to be compiled."""
        self._is_compiling = is_compiling

    def note_launched(self, result: Any) -> None:
        """Takes what the next call will have computed; None for no program."""
        self._num_calls += 1
        self._progress.note(self._num_calls, result)

    def report_capacity(self, num_bytes: int) -> None:
        """Tells what memory a device of this host has."""
        self._send("capacity", num_bytes)

    def report_serving(self) -> None:
        """Tells that this host can run calls."""
        self._send("serving")

    def note_ready(self, num_blocks: int, key: Key) -> None:
        """Tells that a program can be used here."""
        self._send("ready", num_blocks, *key)

    def is_ready(self, num_blocks: int, key: Key) -> bool:
        """Whether a program may be used: the first host has chosen it."""
        del num_blocks, key
        return True

    def fail(self, error: BaseException) -> None:
        """Tells the first host what went wrong here, and ends with all others."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self._send("failed", text)
        # It knows whether this is a consequence of another host's end.
        time.sleep(self._config.timeout)
        self._end_process(f"host {self._config.host_id} failed: {text}")

    def _send(self, *message: Any) -> None:
        # The thread that listens ends this process.
        with contextlib.suppress(ChannelClosedError):
            self._channel.send(*message)

    def _listen(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                self._watch.hear(LEADER)
                if not self._take(message):
                    return
        except ChannelClosedError as error:
            reason = f"host {LEADER} died: {error}"
        except (MessageError, ValueError, TypeError) as error:
            reason = f"host {LEADER} sent what cannot be understood: {error}"
        if not self._closed.is_set():
            self._end_process(reason)

    def _take(self, message: list[Any]) -> bool:
        """Handles a message; False for the last one."""
        name = message[0]
        if name == "end":
            self._end_process(str(message[1]))
        elif name == "bye":
            self._closed.set()
        elif name != "alive":
            self._orders.put(message)
            return True
        return name == "alive"

    def _pulse(self, _: float) -> None:
        launched, done = self._progress.read()
        self._send("alive", launched, done, self._is_compiling())

    def _look(self, seconds: float) -> None:
        reason = self._watch.tick(seconds)
        if reason is not None:
            self._end_process(reason)
