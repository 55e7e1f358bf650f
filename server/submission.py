"""The engine's requests behind one HTTP request, from the queue to their outputs."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Generator, Sequence
from typing import Any, Protocol

from jllm import EngineStoppedError
from server.call import Call
from server.errors import ApiError, FieldNames, engine_dead, from_engine
from server.llm import Outputs
from server.state import Server

MAX_PENDING = 2
"""Outputs per prompt that wait while another one's are being sent."""


class Submitted(Protocol):
    """One prompt and what is asked of it."""

    @property
    def prompt(self) -> Any:
        """See `jllm.LLM.generate`."""
        ...

    @property
    def params(self) -> Any:
        """Sampling parameters, or those of an embedding."""
        ...

    @property
    def priority(self) -> int:
        """Smaller runs first."""
        ...


class Submission:
    """Prompts that are queued together; closed, they all end."""

    def __init__(
        self,
        server: Server,
        call: Call,
        prompts: Sequence[Submitted],
        names: FieldNames,
        stream_interval: int = 1,
    ) -> None:
        """Queues nothing yet.

        Args:
            server: Has the model.
            call: The request, which counts the tokens.
            prompts: What it asks for.
            names: What the request calls the engine's parameters.
            stream_interval: Tokens that an output of a stream waits for.
        """
        self._stream_interval = stream_interval
        self._llm = server.llm
        self._call = call
        self._prompts = prompts
        self._names = names
        self._outputs: list[Outputs | None] = [None] * len(prompts)
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Queues all prompts; afterwards none is refused any more.

        Raises:
            ApiError: The engine refuses one.
        """
        async with self._call.limit():
            if len(self._prompts) == 1:
                await self._open_one(0)
            else:
                # The engine takes requests between steps: all at once, not in turn.
                results = await asyncio.gather(
                    *(self._open_one(i) for i in range(len(self._prompts))),
                    return_exceptions=True,
                )
                for result in results:
                    if isinstance(result, BaseException):
                        raise result
        self._call.num_prompt_tokens = sum(map(len, self.prompt_token_ids))
        self._call.slot.settle(self._call.num_prompt_tokens)

    async def _open_one(self, i: int) -> None:
        item = self._prompts[i]
        name = self._call.request_id
        if len(self._prompts) > 1:
            name = f"{name}-{i}"
        with engine_errors(self._names):
            self._outputs[i] = await self._llm.submit(
                item.prompt,
                item.params,
                name,
                priority=item.priority,
                on_first_token=self._call.note_start,
                stream_interval=self._stream_interval,
            )

    @property
    def prompt_token_ids(self) -> list[Sequence[int]]:
        """Tokens of each prompt."""
        return [outputs.prompt_token_ids for outputs in self._outputs if outputs]

    def close(self) -> None:
        """Ends what still runs; may be called again."""
        for task in self._tasks:
            task.cancel()
        for outputs in self._outputs:
            if outputs is not None:
                outputs.close()

    async def merged(self) -> AsyncIterator[tuple[int, Any]]:
        """Gives the outputs of all prompts as they come, with the prompt's place."""
        if len(self._prompts) == 1:
            only = self._outputs[0]
            assert only is not None
            async for output in only:
                yield 0, output
            return
        size = MAX_PENDING * len(self._prompts)
        news: asyncio.Queue[tuple[int, Any]] = asyncio.Queue(size)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(_pump(i, outputs, news))
            for i, outputs in enumerate(self._outputs)
            if outputs is not None
        ]
        num_running = len(self._tasks)
        while num_running:
            i, item = await news.get()
            if isinstance(item, Exception):
                raise item
            num_running -= item.finished
            yield i, item


async def _pump(
    i: int, outputs: Outputs, news: "asyncio.Queue[tuple[int, Any]]"
) -> None:
    """Moves the outputs of one prompt into the queue of all."""
    try:
        async for output in outputs:
            await news.put((i, output))
    # Whatever it is belongs to the reader of the queue.
    except Exception as error:  # noqa: BLE001
        await news.put((i, error))


@contextlib.contextmanager
def engine_errors(names: FieldNames) -> Generator[None]:
    """Turns errors of the engine into answers."""
    try:
        yield
    except ApiError:
        raise
    except EngineStoppedError as error:
        raise engine_dead() from error
    except Exception as error:
        answer = from_engine(error, names)
        if answer is None:
            raise
        raise answer from error
