"""Runs an engine in a thread of its own, for callers in other threads."""

import atexit
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

from jllm.engine.garbage import QuietGarbage
from jllm.errors import EngineStoppedError
from jllm.types import EngineRequest, StepOutputs

logger = logging.getLogger("jllm")

SHUT_DOWN = "the engine was shut down"


@runtime_checkable
class Outlet(Protocol):
    """Where outputs go.

    Called in the engine's thread, so that it has to be quick: text is made elsewhere.
    """

    def open(self, request_id: str, opened: Any) -> None:
        """Outputs of that id go to this reader from now on."""
        ...

    def forget(self, request_id: str) -> None:
        """Outputs of that id are not wanted any more."""
        ...

    def deliver(self, outputs: StepOutputs) -> None:
        """Takes what a step brought."""
        ...

    def fail(self, error: EngineStoppedError) -> None:
        """Takes the news, once, that nothing more will come for anyone."""
        ...


@runtime_checkable
class Stepper(Protocol):
    """What the loop needs of an engine."""

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would do anything."""
        ...

    def add(self, request: EngineRequest) -> None:
        """Queues a request."""
        ...

    def abort(self, request_id: str) -> None:
        """Ends a request."""
        ...

    def abort_sequence(self, request_id: str, index: int) -> None:
        """Ends one sequence of a request."""
        ...

    def step(self) -> StepOutputs:
        """Computes a step."""
        ...

    def close(self) -> None:
        """Frees the device."""
        ...


class EngineLoop:
    """One worker thread that alone touches the engine.

    Calls from other threads are queued and served between two steps; with nothing to
    do the thread sleeps on that queue. An error in a call goes to its caller. An error
    in a step ends the loop: every open request, and every later call, gets an
    `EngineStoppedError`.
    """

    def __init__(self, engine: Stepper, outlet: Outlet) -> None:
        """Takes over an engine and starts the thread."""
        self._engine = engine
        self._outlet = outlet
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._unfinished: dict[str, set[int]] = {}
        self._garbage = QuietGarbage(freeze=True)
        self._error: EngineStoppedError | None = None
        self._num_steps = 0
        self._accepting = True
        self._lock = threading.Lock()
        self._thread = threading.Thread(
            target=self._run, name="jllm-engine", daemon=True
        )
        self._thread.start()
        # A daemon thread must not be inside the runtime when the interpreter ends.
        atexit.register(self.close)

    @property
    def is_alive(self) -> bool:
        """Whether requests are accepted."""
        return self._accepting

    @property
    def num_steps(self) -> int:
        """Steps computed; a count that stands still with work to do means trouble."""
        return self._num_steps

    @property
    def is_busy(self) -> bool:
        """Whether a step would do anything."""
        return self._engine.has_unfinished

    @property
    def error(self) -> EngineStoppedError | None:
        """What a step failed with; None while it works and after a clean `close`."""
        return self._error

    def add(self, request: EngineRequest, opened: Any) -> Future[None]:
        """Queues a request; the future holds the error if the engine refuses it.

        Args:
            request: What to generate.
            opened: Who reads its outputs, as the outlet knows readers.

        Raises:
            EngineStoppedError: The loop has ended.
        """

        def add() -> None:
            self._engine.add(request)
            self._outlet.open(request.request_id, opened)
            self._unfinished[request.request_id] = set(range(request.params.n))

        return self.call(add)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one sequence of it.

        Unknown ids are ignored, and so is everything once the loop has ended.
        """

        def abort() -> None:
            unfinished = self._unfinished.get(request_id)
            if unfinished is None:
                return
            if index is None or unfinished == {index}:
                del self._unfinished[request_id]
                self._outlet.forget(request_id)
                self._engine.abort(request_id)
            elif index in unfinished:
                unfinished.discard(index)
                self._engine.abort_sequence(request_id, index)

        with contextlib.suppress(EngineStoppedError):
            self.call(abort)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Has the engine's thread call a function between two steps.

        Raises:
            EngineStoppedError: The loop has ended.
        """
        call = _Call(function)
        with self._lock:
            if not self._accepting:
                raise EngineStoppedError(str(self._error or SHUT_DOWN))
            self._calls.put(call)
        return call.future

    def close(self) -> None:
        """Fails the open requests, ends the thread and closes the engine.

        May be called again, and from any thread but the engine's own.
        """
        with self._lock:
            if self._accepting:
                self._accepting = False
                self._calls.put(None)
        self._thread.join()
        atexit.unregister(self.close)

    def _run(self) -> None:
        stopped = EngineStoppedError(SHUT_DOWN)
        try:
            with self._garbage:
                self._work()
        # Whatever a step failed with, those who wait for it have to be told.
        except Exception as error:
            logger.exception("the engine failed")
            reason = f"{type(error).__name__}: {error}"
            stopped = EngineStoppedError(f"the engine has failed: {reason}")
            stopped.__cause__ = error
            self._error = stopped
        finally:
            self._stop(stopped)

    def _work(self) -> None:
        while self._serve_calls():
            if self._engine.has_unfinished:
                self._deliver(self._engine.step())
                self._num_steps += 1
                self._garbage.note_step()

    def _serve_calls(self) -> bool:
        """Serves all queued calls; sleeps for one when idle. False asks for the end."""
        while True:
            is_idle = not self._engine.has_unfinished
            if is_idle and self._calls.empty():
                self._garbage.note_idle()
            try:
                call = self._calls.get(block=is_idle)
            except queue.Empty:
                return True
            if call is None:
                return False
            call.run()

    def _deliver(self, outputs: StepOutputs) -> None:
        for output in outputs.others:
            if output.finish_reason is not None:
                self._note_end(output.request_id, output.index)
        self._outlet.deliver(outputs)

    def _note_end(self, request_id: str, index: int) -> None:
        unfinished = self._unfinished[request_id]
        unfinished.discard(index)
        if not unfinished:
            del self._unfinished[request_id]

    def _stop(self, error: EngineStoppedError) -> None:
        with self._lock:
            self._accepting = False
        while not self._calls.empty():
            call = self._calls.get()
            if call is not None:
                call.fail(error)
        self._outlet.fail(error)
        self._unfinished.clear()
        self._engine.close()


class _Call:
    """A function to be called in the engine's thread, and where its result goes."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.future: Future[Any] = Future()

    def run(self) -> None:
        """Calls the function, unless its caller has given up."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self._function())
        # Any error belongs to the caller, not to this thread.
        except Exception as error:  # noqa: BLE001
            self.future.set_exception(error)

    def fail(self, error: EngineStoppedError) -> None:
        """Refuses the call."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)
