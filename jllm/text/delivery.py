"""From the engine's thread through the thread that makes text to an event loop."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Self

from jllm.errors import EngineStoppedError
from jllm.text.embedding import Stream
from jllm.types import StepOutputs, TokenOutput

logger = logging.getLogger("jllm")

MAX_STEPS_BEHIND = 256
"""Steps whose tokens wait to be put into text before the engine waits too."""


class OpenRequest:
    """One open request: the output thread writes its stream, an event loop reads it.

    Both hold a lock while they touch the stream, for microseconds. The reader is woken
    only if it has read since it was woken last, so that a slow one is told of many
    tokens at once.

    Args:
        event_loop: Where it is read.
        on_first_token: Called there.
    """

    def __init__(
        self,
        event_loop: asyncio.AbstractEventLoop,
        on_first_token: Callable[[], None] | None = None,
    ) -> None:
        """Begins without a stream."""
        self.event_loop = event_loop
        self._on_first_token = on_first_token
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._end: Callable[[int | None], None] | None = None
        self._news = asyncio.Event()
        self._error: Exception | None = None
        self._has_first = False
        self._is_woken = False
        self._is_aborted = False

    def open(self, stream: Stream, end: Callable[[int | None], None]) -> None:
        """Names the stream, which an abort may have preceded.

        Args:
            stream: What collects the outputs.
            end: Has the engine end a sequence, or with None the request.
        """
        self._stream, self._end = stream, end
        if self._is_aborted:
            self.abort()

    # --- in the output thread ------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self._error is not None or (
            self._stream is not None and self._stream.finished
        )

    def push_token(self, index: int, token_id: int) -> bool:
        """Takes a sequence's next token; returns whether to wake the reader."""
        assert self._stream is not None
        with self._lock:
            try:
                if self._stream.push_token(index, token_id):
                    self.end(index)
            # It belongs to the reader, who would wait forever.
            except Exception as error:  # noqa: BLE001
                self._fail(error)
            return self._wakes()

    def push(self, output: TokenOutput) -> bool:
        """Takes an output of a sequence; returns whether to wake the reader."""
        assert self._stream is not None
        with self._lock:
            try:
                if self._stream.push(output):
                    self.end(output.index)
            except Exception as error:  # noqa: BLE001
                self._fail(error)
            if not self._has_first and (output.token_ids or output.pooled is not None):
                self._has_first = True
                # It is told of the first token, whatever it is to read of it.
                return self._wakes(always=self._on_first_token is not None)
            return self._wakes()

    def fail(self, error: EngineStoppedError) -> bool:
        """Takes the news that the engine has stopped, and is to wake the reader."""
        with self._lock:
            self._error = error
            return self._wakes()

    def end(self, index: int | None = None) -> None:
        """Has the engine end a sequence, or the request."""
        assert self._end is not None
        self._end(index)

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
            self.end()

    def _wakes(self, *, always: bool = False) -> bool:
        has_news = always or self._error is not None
        if not has_news and self._stream is not None:
            has_news = self._stream.has_output
        wakes = has_news and not self._is_woken
        self._is_woken = self._is_woken or has_news
        return wakes

    # --- in the event loop ---------------------------------------------------

    def notify(self) -> None:
        """Wakes the reader."""
        if self._has_first and self._on_first_token is not None:
            tell, self._on_first_token = self._on_first_token, None
            tell()
        self._news.set()

    def abort(self) -> None:
        """Ends the request on this side."""
        self._is_aborted = True
        if self._stream is not None:
            with self._lock:
                self._stream.abort()
        self._news.set()

    async def read(self) -> Any:
        """Waits for news, and gives the next output; None if it is not there yet.

        Raises:
            EngineStoppedError: The engine has stopped.
            Exception: Whatever its tokens could not be put into text for.
        """
        await self._news.wait()
        self._news.clear()
        assert self._stream is not None
        with self._lock:
            self._is_woken = False
            error = self._error
            output = None if error else self._stream.take()
        if isinstance(error, EngineStoppedError):
            raise EngineStoppedError(str(error)) from error
        if error is not None:
            raise error
        return output


class OutputStream:
    """The outputs of one request, as they come; closed early it ends the request."""

    def __init__(
        self,
        opened: OpenRequest,
        request_id: str,
        prompt_token_ids: Sequence[int],
        end: Callable[[], None],
    ) -> None:
        """Made by `AsyncLLM.submit`."""
        self._opened = opened
        self._request_id = request_id
        self._prompt_token_ids = prompt_token_ids
        self._end = end
        self._is_finished = False
        self._is_closed = False

    @property
    def request_id(self) -> str:
        """Name of the request."""
        return self._request_id

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """Tokens of the prompt."""
        return self._prompt_token_ids

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        while not (self._is_finished or self._is_closed):
            output = await self._opened.read()
            if output is not None:
                self._is_finished = output.finished
                return output
        self.close()
        raise StopAsyncIteration

    def close(self) -> None:
        """Ends the request; may be called again."""
        if not self._is_closed:
            self._is_closed = True
            self._end()


class OutputThread:
    """Puts tokens into text in a thread of its own, and wakes those who read it.

    It alone touches the table of open requests. The engine's thread hands it what
    happens, in order, and waits only if it has fallen far behind.
    """

    def __init__(self) -> None:
        """Starts the thread."""
        self._calls: queue.Queue[Callable[[], object] | None] = queue.Queue(
            MAX_STEPS_BEHIND
        )
        self._open: dict[str, OpenRequest] = {}
        self._thread = threading.Thread(
            target=self._run, name="jllm-output", daemon=True
        )
        self._thread.start()

    def open(self, request_id: str, opened: OpenRequest) -> None:
        """Outputs of that id go to this request from now on."""
        self._calls.put(partial(self._open.__setitem__, request_id, opened))

    def forget(self, request_id: str) -> None:
        """Drops a request; unknown ids are ignored."""
        self._calls.put(partial(self._open.pop, request_id, None))

    def deliver(self, outputs: StepOutputs) -> None:
        """Hands on what a step brought."""
        if outputs:
            self._calls.put(partial(self._deliver, outputs))

    def fail(self, error: EngineStoppedError) -> None:
        """Tells all open requests that the engine has stopped."""
        self._calls.put(partial(self._fail, error))

    def close(self) -> None:
        """Ends the thread once everything handed on has been delivered."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            # Readers of other requests and later steps are not to suffer from it.
            except Exception:
                logger.exception("outputs could not be delivered")

    def _deliver(self, outputs: StepOutputs) -> None:
        table, woken = self._open, list[OpenRequest]()
        for (request_id, index), token_id in zip(
            outputs.keys, outputs.token_ids, strict=True
        ):
            opened = table.get(request_id)
            if opened is not None and opened.push_token(index, token_id):
                woken.append(opened)
        for output in outputs.others:
            opened = table.get(output.request_id)
            if opened is None:
                continue
            if opened.push(output):
                woken.append(opened)
            if opened.finished:
                del table[output.request_id]
        self._wake(woken)

    def _fail(self, error: EngineStoppedError) -> None:
        self._wake([opened for opened in self._open.values() if opened.fail(error)])
        self._open.clear()

    def _wake(self, woken: Sequence[OpenRequest]) -> None:
        """Wakes each event loop once."""
        groups: dict[asyncio.AbstractEventLoop, list[OpenRequest]] = {}
        for opened in woken:
            groups.setdefault(opened.event_loop, []).append(opened)
        for event_loop, group in groups.items():
            try:
                event_loop.call_soon_threadsafe(_notify_all, group)
            except RuntimeError:
                logger.warning(
                    "%d requests are read no more: %s is closed", len(group), event_loop
                )
                for opened in group:
                    opened.end()


def _notify_all(group: Iterable[OpenRequest]) -> None:
    for opened in group:
        try:
            opened.notify()
        # Whoever is told of a first token must not keep the others waiting.
        except Exception:
            logger.exception("a reader of outputs has failed")
