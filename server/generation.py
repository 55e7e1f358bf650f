"""Runs the prompts of one request; gives what they bring as pieces of its outputs."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Generator, Sequence
from typing import Any

from jllm import (
    CompletionOutput,
    EngineStoppedError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from server.call import Call
from server.errors import (
    ApiError,
    FieldNames,
    engine_dead,
    failed_sequence,
    from_engine,
    unavailable,
)
from server.llm import Outputs
from server.state import Server

MAX_PENDING = 2
"""Outputs per prompt that wait while another one's are being sent."""


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One prompt.

    Attributes:
        prompt: See `jllm.LLM.generate`.
        params: How its outputs are generated.
        num_outputs: Outputs asked for; greedy ones are generated once and copied.
        priority: Smaller runs first.
    """

    prompt: Any
    params: SamplingParams
    num_outputs: int = 1
    priority: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """News of one output.

    Attributes:
        index: Which of the outputs of the whole request.
        completion: What is new, or all of it where nothing is streamed.
        prompt_logprobs: Scores of the prompt, with the first piece of its first output.
    """

    index: int
    completion: CompletionOutput
    prompt_logprobs: list[Any] | None = None


class Generation:
    """The engine's requests behind one HTTP request; closed, they all end."""

    def __init__(
        self, server: Server, call: Call, jobs: Sequence[Job], names: FieldNames
    ) -> None:
        """Queues nothing yet.

        Args:
            server: Has the model.
            call: The request, which counts the tokens.
            jobs: Its prompts.
            names: What the request calls the engine's parameters.
        """
        self._llm = server.llm
        self._metrics = server.metrics
        self._call = call
        self._jobs = jobs
        self._names = names
        self._outputs: list[Outputs | None] = [None] * len(jobs)
        self._tasks: list[asyncio.Task[None]] = []
        self._last_times: dict[tuple[int, int], float] = {}

    async def open(self) -> None:
        """Queues all prompts; afterwards none is refused any more.

        Raises:
            ApiError: The engine refuses one.
        """
        async with self._call.limit():
            if len(self._jobs) == 1:
                await self._open_one(0)
            else:
                # The engine takes requests between steps: all at once, not in turn.
                results = await asyncio.gather(
                    *(self._open_one(i) for i in range(len(self._jobs))),
                    return_exceptions=True,
                )
                for result in results:
                    if isinstance(result, BaseException):
                        raise result
        self._call.num_prompt_tokens = sum(map(len, self.prompt_token_ids))
        self._call.slot.settle(self._call.num_prompt_tokens)

    async def _open_one(self, i: int) -> None:
        job = self._jobs[i]
        name = self._call.request_id
        if len(self._jobs) > 1:
            name = f"{name}-{i}"
        with engine_errors(self._names):
            self._outputs[i] = await self._llm.submit(
                job.prompt,
                job.params,
                name,
                priority=job.priority,
                on_first_token=self._call.note_start,
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

    async def pieces(self) -> AsyncIterator[Piece]:
        """Gives the news of all outputs as they come.

        Raises:
            ApiError: The engine has failed, or one of the outputs.
        """
        with engine_errors(self._names):
            async for i, output in self._merged():
                self._note(i, output)
                first = sum(job.num_outputs for job in self._jobs[:i])
                for piece in self._split(i, first, output):
                    yield piece

    async def _merged(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        if len(self._jobs) == 1:
            only = self._outputs[0]
            assert only is not None
            async for output in only:
                yield 0, output
            return
        size = MAX_PENDING * len(self._jobs)
        news: asyncio.Queue[tuple[int, RequestOutput | Exception]] = asyncio.Queue(size)
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

    def _note(self, i: int, output: RequestOutput) -> None:
        """Counts tokens; those of a copied output count once per copy."""
        call, job = self._call, self._jobs[i]
        if output.num_cached_tokens and output.finished:
            call.num_cached_tokens += output.num_cached_tokens
        counts = [len(completion.token_ids) for completion in output.outputs]
        if job.params.output_kind is RequestOutputKind.DELTA:
            for completion, count in zip(output.outputs, counts, strict=True):
                self._note_time((i, completion.index), count)
        copies = job.num_outputs // job.params.n
        call.note_tokens(copies * sum(counts), output.metrics)
        self._metrics.note_generated(sum(counts))

    def _note_time(self, key: tuple[int, int], count: int) -> None:
        """Counts the time between the tokens of one output."""
        if count:
            now = time.monotonic()
            if key in self._last_times:
                self._metrics.observe_token(now - self._last_times[key], count)
            self._last_times[key] = now

    def _split(self, i: int, first: int, output: RequestOutput) -> list[Piece]:
        job, found = self._jobs[i], list[Piece]()
        scores = output.prompt_logprobs
        for completion in output.outputs:
            if completion.finish_reason == "error":
                raise failed_sequence()
            if completion.finish_reason == "abort":
                raise unavailable("the request was ended by the server", "aborted")
            copies = [completion.index]
            if job.num_outputs > job.params.n:
                copies = list(range(job.num_outputs))
            for index in copies:
                found.append(Piece(first + index, completion, scores))
            if completion.finish_reason is not None:
                self._call.reasons += [completion.finish_reason] * len(copies)
        return found


async def _pump(
    i: int,
    outputs: Outputs,
    news: "asyncio.Queue[tuple[int, RequestOutput | Exception]]",
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
