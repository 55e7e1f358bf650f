"""Server-sent events: framing, a slow reader's patience, and errors under way."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from aiohttp import web

from server.answer import to_json
from server.call import CALL, REASON, REQUEST_ID
from server.config import ServerConfig
from server.errors import ApiError, internal

logger = logging.getLogger("jllm.server")

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
FRAMING_BYTES = 64
"""More than what HTTP puts around a chunk."""


def event(value: Any, name: str | None = None) -> bytes:
    """Frames one JSON value; JSON has no line breaks outside its strings' escapes."""
    text = to_json(value)
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {text}\n\n".encode()


class EventStream:
    """The answer to one request as a stream of events.

    What a reader does not take stays with the engine's output, which merges, so that
    memory is bounded by the bytes in the buffer and the tokens asked for. A reader that
    takes nothing for `write_timeout` seconds is given up.
    """

    def __init__(
        self,
        request: web.Request,
        config: ServerConfig,
        *,
        done: bytes = DONE,
        frame_error: Callable[[ApiError], bytes] | None = None,
    ) -> None:
        """Sends nothing yet.

        Args:
            request: The request to answer; a call is open for it.
            config: Bounds of time and bytes.
            done: The end mark, which follows an error too.
            frame_error: Makes the event that an error is.
        """
        self._done = done
        self._frame_error = frame_error or _frame_error
        self._request = request
        self._config = config
        self._response = web.StreamResponse(headers=HEADERS)
        self._comments: asyncio.Task[None] | None = None
        self._has_written = False

    @property
    def response(self) -> web.StreamResponse:
        """The answer, for the handler to return."""
        return self._response

    async def send_all(self, events: AsyncGenerator[bytes, None]) -> None:
        """Sends headers, all events, and the end mark; errors become events."""
        await self._response.prepare(self._request)
        if (transport := self._request.transport) is not None:
            transport.set_write_buffer_limits(high=self._config.max_buffered_bytes)
        loop = asyncio.get_running_loop()
        self._comments = loop.create_task(self._keep_alive())
        try:
            await self._send_events(events)
            # A comment behind the last chunk would be taken for the next answer.
            self._comments.cancel()
            await self._write(self._done, is_last=True)
        except (ConnectionError, SlowClientError) as error:
            slow = isinstance(error, SlowClientError)
            self._request[REASON] = "abort_slow_client" if slow else "abort_client"
            if self._request.transport is not None:
                self._request.transport.abort()
        finally:
            self._comments.cancel()

    async def _send_events(self, events: AsyncGenerator[bytes, None]) -> None:
        try:
            async with self._request[CALL].limit(), contextlib.aclosing(events):
                async for chunk in events:
                    # Half a character makes no text yet.
                    if chunk:
                        await self._write(chunk)
        except ApiError as error:
            self._request[REASON] = _reason(error)
            await self._write(self._frame_error(error))
        except (ConnectionError, SlowClientError):
            raise
        # The status is sent; the client must still learn that this is not the end.
        except Exception:
            name = self._request[REQUEST_ID]
            logger.exception("request %s failed", name)
            self._request[REASON] = "error"
            await self._write(self._frame_error(internal(name)))

    async def _write(self, chunk: bytes, *, is_last: bool = False) -> None:
        self._has_written = True
        send = self._response.write_eof if is_last else self._response.write
        if self._has_room(len(chunk)):
            await send(chunk)
            return
        try:
            async with asyncio.timeout(self._config.write_timeout):
                await send(chunk)
        except TimeoutError as error:
            raise SlowClientError from error

    def _has_room(self, size: int) -> bool:
        """Whether the buffer takes so many bytes, so that nothing waits to be sent."""
        transport = self._request.transport
        if transport is None:
            return False
        free = self._config.max_buffered_bytes - transport.get_write_buffer_size()
        return size + FRAMING_BYTES <= free

    async def _keep_alive(self) -> None:
        """Sends a comment whenever nothing else was sent for a while."""
        # That the client has left is told to the handler.
        with contextlib.suppress(ConnectionError):
            while True:
                self._has_written = False
                await asyncio.sleep(self._config.keep_alive_interval)
                if not self._has_written:
                    await self._response.write(COMMENT)


class SlowClientError(Exception):
    """A client that takes nothing for too long."""


def _frame_error(error: ApiError) -> bytes:
    return event(error.body)


def _reason(error: ApiError) -> str:
    return "abort_deadline" if error.code == "timeout" else "error"
