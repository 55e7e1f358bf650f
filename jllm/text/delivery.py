"""From the engine's thread to those who wait for outputs in an event loop."""

import asyncio
import collections
from collections.abc import Callable, Sequence
from typing import Any, Self

from jllm.errors import EngineStoppedError
from jllm.text.output import RequestStream
from jllm.types import RequestOutput, TokenOutput


class OpenRequest:
    """One open request, as the event loop sees it."""

    def __init__(self, on_first_token: Callable[[], None] | None = None) -> None:
        self._on_first_token = on_first_token
        self._stream: RequestStream | None = None
        self._news = asyncio.Event()
        self._error: Exception | None = None
        self._is_aborted = False

    def open(self, stream: RequestStream) -> None:
        """Names the stream, which an abort may have preceded."""
        self._stream = stream
        if self._is_aborted:
            self.abort()

    def receive(self, output: TokenOutput) -> bool:
        """Takes new tokens; returns whether the engine has to end their sequence."""
        assert self._stream is not None
        self._news.set()
        if self._on_first_token is not None and output.token_ids:
            self._on_first_token()
            self._on_first_token = None
        try:
            return self._stream.push(output)
        # It belongs to the reader, who ends the request and would wait forever.
        except Exception as error:  # noqa: BLE001
            self._error = error
            return False

    def fail(self, error: EngineStoppedError) -> None:
        """Takes the news that the engine has stopped."""
        self._error = error
        self._news.set()

    def abort(self) -> None:
        """Ends the request on this side."""
        self._is_aborted = True
        if self._stream is not None:
            self._stream.abort()
        self._news.set()

    async def wait(self) -> None:
        """Waits for news.

        Raises:
            EngineStoppedError: They are that the engine has stopped.
            Exception: Whatever its tokens could not be put into text for.
        """
        await self._news.wait()
        self._news.clear()
        if isinstance(self._error, EngineStoppedError):
            raise EngineStoppedError(str(self._error)) from self._error
        if self._error is not None:
            raise self._error


class OutputStream:
    """The outputs of one request, as they come; closed early it ends the request."""

    def __init__(
        self,
        opened: OpenRequest,
        stream: RequestStream,
        prompt_token_ids: Sequence[int],
        end: Callable[[], None],
    ) -> None:
        """Made by `AsyncLLM.submit`."""
        self._opened = opened
        self._stream = stream
        self._prompt_token_ids = prompt_token_ids
        self._end = end
        self._is_finished = False
        self._is_closed = False

    @property
    def request_id(self) -> str:
        """Name of the request."""
        return self._stream.request_id

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """Tokens of the prompt."""
        return self._prompt_token_ids

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        while not (self._is_finished or self._is_closed):
            await self._opened.wait()
            output = self._stream.take()
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


class Mailbox:
    """Hands items of the engine's thread to an event loop, waking it once for many."""

    def __init__(self, event_loop: asyncio.AbstractEventLoop) -> None:
        self.event_loop = event_loop
        self._items: collections.deque[tuple[Callable[[Any], None], Any]] = (
            collections.deque()
        )
        self._is_woken = False

    def sink(self, receive: Callable[[Any], None]) -> Callable[[Any], None]:
        """A function for the engine's thread that has `receive` called in the loop."""

        def post(item: Any) -> None:
            self._items.append((receive, item))
            # Appended first, so that the drain that clears the flag sees the item.
            if not self._is_woken:
                self._is_woken = True
                try:
                    self.event_loop.call_soon_threadsafe(self._drain)
                except RuntimeError:
                    # The loop is closed: whoever posts next has to hear of it too.
                    self._is_woken = False
                    self._items.clear()
                    raise

        return post

    def _drain(self) -> None:
        self._is_woken = False
        try:
            while self._items:
                receive, item = self._items.popleft()
                receive(item)
        finally:
            # A reader that fails does not keep the others' items waiting.
            if self._items and not self._is_woken:
                self._is_woken = True
                self.event_loop.call_soon(self._drain)
