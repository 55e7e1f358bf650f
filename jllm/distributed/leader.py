"""The first host's side: it tells the others what to run, and watches them."""

import atexit
import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from jllm.config import HostConfig
from jllm.distributed.channel import Channel, ChannelClosedError, broadcast
from jllm.distributed.ending import every, exit_process, start_thread
from jllm.distributed.messages import MessageError
from jllm.distributed.watch import Progress, Watch
from jllm.errors import ConfigError

GRACE_SECONDS = 2.0
"""How long the other hosts get to say why the job ends."""

Key = tuple[str, int]
"""Kind and size of a program."""


class Leader:
    """Sends calls to the other hosts in the order in which this host makes them.

    Threads of its own listen to the others, send signs of life, and end all hosts when
    one is lost.

    Args:
        config: The hosts.
        channels: Connection to each of the others, by id.
        end_process: Ends this process.
    """

    def __init__(
        self,
        config: HostConfig,
        channels: Mapping[int, Channel],
        end_process: Callable[[str], Any] = exit_process,
    ) -> None:
        """Starts the threads."""
        self._config, self._channels = config, dict(channels)
        self._end_process = end_process
        self._progress = Progress()
        self._watch = Watch(config.timeout, range(config.num_hosts))
        self._asked = 0
        self._is_compiling: Callable[[], bool] = bool
        self._changed = threading.Condition()
        self._answers: dict[tuple[int, str], Any] = {}
        self._ready: dict[int, set[tuple[int, Key]]] = {
            host: set() for host in channels
        }
        self._gone: set[int] = set()
        self._ending = threading.Lock()
        self._closed = threading.Event()
        period = config.heartbeat
        for host, channel in self._channels.items():
            start_thread(partial(self._listen, host, channel), f"jllm-host-{host}")
            # A thread each: a host that takes nothing must not silence this one.
            pulse = partial(self._pulse, channel)
            every(period, pulse, self._closed, f"jllm-pulse-{host}")
        every(period, self._look, self._closed, "jllm-watch")

    def send(self, name: str, size: int, arrays: Sequence[np.ndarray | None]) -> None:
        """Has the others make a call that this host makes next."""
        self._asked += 1
        self._tell("run", name, size, list(arrays))

    def note_launched(self, result: Any) -> None:
        """Takes what the last call will have computed on this host."""
        self._progress.note(self._asked, result)

    def watch_compiling(self, is_compiling: Callable[[], bool]) -> None:
        """Takes how to see whether this host waits for a program to be compiled."""
        self._is_compiling = is_compiling

    def announce_pool(self, num_blocks: int) -> None:
        """Has the others compile programs for a pool of so many blocks."""
        self._tell("pool", num_blocks)

    def least_capacity(self, own: int) -> int:
        """The least memory of a device, in bytes, of this host and the others."""
        return min(own, *self._await("capacity"))

    def start_serving(self) -> None:
        """Waits for the others to be able to run calls."""
        self._tell("serve")
        self._await("serving")

    def note_ready(self, num_blocks: int, key: Key) -> None:
        """Nobody waits for this host's own programs."""

    def is_ready(self, num_blocks: int, key: Key) -> bool:
        """Whether all other hosts have a program."""
        return all((num_blocks, key) in ready for ready in self._ready.values())

    def close(self) -> None:
        """Ends the others, once they have run all calls; may be called again."""
        atexit.unregister(self.close)
        if self._closed.is_set():
            return
        self._tell("stop")
        self._await("stopped", self._config.timeout)
        self._closed.set()
        self._tell("bye")
        for channel in self._channels.values():
            channel.close()

    def give_up(self, reason: str) -> None:
        """Ends the others with an error, but not this process."""
        if self._closed.is_set() or not self._ending.acquire(blocking=False):
            return
        self._closed.set()
        self._spread(reason)

    def end(self, reason: str) -> None:
        """Ends all hosts, this one last."""
        if not self._ending.acquire(blocking=False):
            return
        self._closed.set()
        self._spread(reason)
        self._end_process(reason)

    def _spread(self, reason: str) -> None:
        for channel in self._channels.values():
            # A host that takes nothing would hold this thread.
            last = partial(_send_quietly, channel, "end", reason)
            start_thread(last, "jllm-end")
        deadline = time.monotonic() + GRACE_SECONDS
        with self._changed:
            while len(self._gone) < len(self._channels):
                if not self._changed.wait(deadline - time.monotonic()):
                    break

    def _tell(self, *message: Any) -> None:
        try:
            broadcast(list(self._channels.values()), *message)
        except ChannelClosedError:
            # The thread that listens to that host ends this process.
            self._closed.wait()

    def _await(self, answer: str, timeout: float | None = None) -> list[Any]:
        """Waits for an answer of all hosts; returns their values.

        Raises:
            ConfigError: Not all have answered in time; names them.
        """
        seconds = self._config.start_timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        wanted = [(host, answer) for host in self._channels]
        with self._changed:
            while missing := [key for key in wanted if key not in self._answers]:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    names = ", ".join(str(host) for host, _ in missing)
                    reason = f"host {names} is not {answer} after {seconds:g} s"
                    self.end(reason)
                    raise ConfigError(reason)
            return [self._answers[key] for key in wanted]

    def _listen(self, host: int, channel: Channel) -> None:
        try:
            while True:
                self._take(host, channel.receive())
        except ChannelClosedError as error:
            reason = f"host {host} died: {error}"
        except (MessageError, ValueError, TypeError) as error:
            reason = f"host {host} sent what cannot be understood: {error}"
        with self._changed:
            self._gone.add(host)
            self._changed.notify_all()
        if not self._closed.is_set():
            self.end(reason)

    def _take(self, host: int, message: list[Any]) -> None:
        name, *values = message
        self._watch.hear(host)
        if name == "alive":
            launched, done, is_compiling = values
            self._watch.report(host, launched, done, is_compiling=is_compiling)
        elif name == "ready":
            num_blocks, kind, size = values
            self._ready[host].add((num_blocks, (kind, size)))
        elif name == "failed":
            # If another host has died, that is the reason, and will be known soon.
            reason = f"host {host} failed: {values[0]}"
            threading.Timer(self._config.heartbeat, self.end, [reason]).start()
        elif name in ("capacity", "serving", "stopped"):
            with self._changed:
                self._answers[host, name] = values[0] if values else None
                self._changed.notify_all()
        else:
            raise MessageError(f"unknown message {name!r}")

    def _pulse(self, channel: Channel, _: float) -> None:
        _send_quietly(channel, "alive")

    def _look(self, seconds: float) -> None:
        launched, done = self._progress.read()
        asked, is_compiling = self._asked, self._is_compiling()
        self._watch.report(0, launched, done, is_compiling=is_compiling)
        reason = self._watch.tick(seconds, asked)
        if reason is not None:
            self.end(reason)


def _send_quietly(channel: Channel, *message: Any) -> None:
    """Sends; whoever listens to the channel sees that it is gone."""
    with contextlib.suppress(ChannelClosedError):
        channel.send(*message)
