"""Runs the prompts of one request; gives what they bring as pieces of its outputs."""

import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from jllm import CompletionOutput, RequestOutput, RequestOutputKind, SamplingParams
from server.call import Call
from server.errors import FieldNames, failed_sequence, unavailable
from server.state import Server
from server.submission import Submission, engine_errors


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


class Generation(Submission):
    """Prompts that are completed."""

    def __init__(
        self,
        server: Server,
        call: Call,
        jobs: Sequence[Job],
        names: FieldNames,
        stream_interval: int | None = None,
    ) -> None:
        """Queues nothing yet.

        Args:
            server: Has the model.
            call: The request, which counts the tokens.
            jobs: Its prompts.
            names: What the request calls the engine's parameters.
            stream_interval: Tokens that an output of a stream waits for; None takes the
                server's.
        """
        interval = stream_interval or server.config.stream_interval
        super().__init__(server, call, jobs, names, interval)
        self._metrics = server.metrics
        self._jobs = jobs
        self._last_times: dict[tuple[int, int], float] = {}

    async def pieces(self) -> AsyncIterator[Piece]:
        """Gives the news of all outputs as they come.

        Raises:
            ApiError: The engine has failed, or one of the outputs.
        """
        with engine_errors(self._names):
            async for i, output in self.merged():
                self._note(i, output)
                first = sum(job.num_outputs for job in self._jobs[:i])
                for piece in self._split(i, first, output):
                    yield piece

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
