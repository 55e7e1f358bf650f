"""Work in threads that end by themselves and never keep a process from ending."""

import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class BackgroundWork:
    """Runs calls in the order of their submission, a few at a time.

    Threads live only while there is work. When the interpreter ends, it waits for calls
    that run, while those in the queue are dropped; an executor would run them all.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        """Starts no thread yet."""
        self._num_threads, self._name = num_threads, name
        self._lock = threading.Lock()
        self._queue: collections.deque[tuple[Future[Any], Callable[[], Any]]]
        self._queue = collections.deque()
        self._threads: set[threading.Thread] = set()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Queues a call."""
        future: Future[Any] = Future()
        with self._lock:
            self._queue.append((future, call))
            if len(self._threads) < self._num_threads:
                thread = threading.Thread(target=self._work, name=self._name)
                self._threads.add(thread)
                thread.start()
        return future

    def hasten(self, future: Future[Any]) -> None:
        """Moves a call that somebody waits for to the head of the queue."""
        with self._lock:
            waiting = [item for item in self._queue if item[0] is future]
            for item in waiting:
                self._queue.remove(item)
                self._queue.appendleft(item)

    def close(self) -> None:
        """Drops the queue and waits for the calls that run."""
        with self._lock:
            dropped = list(self._queue)
            self._queue.clear()
            threads = list(self._threads)
        for future, _ in dropped:
            future.cancel()
        for thread in threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                # Not alive: the interpreter is ending, and waits for this thread.
                if not self._queue or not threading.main_thread().is_alive():
                    self._threads.discard(threading.current_thread())
                    return
                future, call = self._queue.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - it goes to whoever waits
                future.set_exception(error)
