"""One inference request, from its reservation to its line in the log."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Generator
from typing import Any

from aiohttp import web

from jllm import RequestMetrics
from server.admission import Slot
from server.errors import timed_out
from server.state import Server, new_id


@dataclasses.dataclass(slots=True)
class Call:
    """What is known of a request while it is served.

    Attributes:
        request_id: Its name in the engine.
        slot: Its place in the queue.
        arrival: When it came, on the monotonic clock.
        num_sequences: How many outputs it wants.
        max_tokens: Most tokens of each, if it says so.
        num_prompt_tokens: Tokens of its prompts.
        num_cached_tokens: Those found in the prefix cache.
        num_output_tokens: Tokens generated.
        num_reasoning_tokens: Those of them that were spent on reasoning.
        reasons: Why its sequences have ended.
        scheduled_time: When the first of its steps began.
        first_token_time: When its first token came.
        last_token_time: When its last token came.
        request_timeout: Seconds from its arrival in which it must end.
        queue_timeout: Seconds from its arrival in which its first token must come.
        timer: The timer that runs while it is worked on.
    """

    request_id: str
    slot: Slot
    arrival: float
    num_sequences: int = 1
    max_tokens: int | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_reasoning_tokens: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)
    scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    request_timeout: float | None = None
    queue_timeout: float | None = None
    timer: asyncio.Timeout | None = None

    def note_start(self) -> None:
        """Leaves the queue: the first token of one of the outputs has come."""
        if not self.slot.is_queued:
            return
        self.slot.start()
        self.first_token_time = time.monotonic()
        if self.timer is not None and not self.timer.expired():
            self.timer.reschedule(self._end_of(self.request_timeout))

    def note_tokens(self, count: int, metrics: RequestMetrics | None) -> None:
        """Counts new tokens; the engine's times are nearer than the present one."""
        if not count:
            return
        now = time.monotonic()
        self.num_output_tokens += count
        self.last_token_time = now
        if metrics is not None and self.scheduled_time is None:
            self.first_token_time = metrics.first_token_time or self.first_token_time
            self.scheduled_time = metrics.scheduled_time

    @contextlib.asynccontextmanager
    async def limit(self) -> AsyncGenerator[None]:
        """Bounds the time of what is done inside; every wait for the engine is.

        Raises:
            ApiError: The time has passed.
        """
        ends = [self._end_of(self.request_timeout)]
        if self.slot.is_queued:
            ends.append(self._end_of(self.queue_timeout))
        try:
            known = [end for end in ends if end is not None]
            async with asyncio.timeout_at(min(known, default=None)) as self.timer:
                yield
        except TimeoutError as error:
            raise timed_out("the request was not finished in time") from error
        finally:
            self.timer = None

    def _end_of(self, seconds: float | None) -> float | None:
        """A moment on the event loop's clock."""
        if seconds is None:
            return None
        spent = time.monotonic() - self.arrival
        return asyncio.get_running_loop().time() + seconds - spent

    @property
    def summary(self) -> dict[str, Any]:
        """What the log and the trace say of it."""

        def milliseconds(moment: float | None) -> float | None:
            return None if moment is None else round(1000 * (moment - self.arrival), 1)

        return {
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "completion_tokens": self.num_output_tokens,
            "queue_ms": milliseconds(self.scheduled_time),
            "ttft_ms": milliseconds(self.first_token_time),
        }


CALL = web.RequestKey("call", Call)
REASON = web.RequestKey("reason", str)
REQUEST_ID = web.RequestKey("request_id", str)
ARRIVAL = web.RequestKey("arrival", float)
"""Keys of what a web request carries: the call, why it ended, its name, its time."""


@contextlib.contextmanager
def open_call(
    request: web.Request, server: Server, num_sequences: int, num_tokens: int
) -> Generator[Call]:
    """Reserves a place in the queue for a request, and gives it back at the end.

    Raises:
        ApiError: The queue is full.
    """
    name, arrival = new_id("req-"), request[ARRIVAL]
    with reserve_call(server, (name, arrival), num_sequences, num_tokens) as call:
        request[CALL] = call
        yield call


@contextlib.contextmanager
def reserve_call(
    server: Server, origin: tuple[str, float], num_sequences: int, num_tokens: int
) -> Generator[Call]:
    """Does the same for what outlives its request.

    Args:
        server: Has the queue.
        origin: Name and time of arrival.
        num_sequences: Outputs asked for.
        num_tokens: About how many tokens its prompts have.

    Raises:
        ApiError: The queue is full.
    """
    call = Call(
        origin[0],
        server.admission.reserve(num_sequences, num_tokens),
        origin[1],
        num_sequences=num_sequences,
        request_timeout=server.config.request_timeout,
        queue_timeout=server.config.queue_timeout,
    )
    try:
        yield call
    finally:
        call.slot.release()
        server.metrics.observe_call(call)
