"""POST /v1/completions."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from aiohttp import web

from server.answer import ChunkFrame, Envelope, json_response, to_json, usage
from server.call import Call, open_call
from server.completion_output import CompletionChoice, CompletionOptions
from server.errors import FieldNames, bad_request
from server.generation import Generation, Job
from server.logprobs import TokenNames
from server.protocol.completions import CompletionRequest
from server.routes.common import (
    cache_salt,
    check_stream_options,
    make_job,
    make_prompt,
    receive,
)
from server.sampling import constraint_name, make_params, structured_outputs
from server.sse import EventStream
from server.state import Server, new_id
from server.submission import engine_errors

DEFAULT_MAX_TOKENS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A checked request.

    Attributes:
        jobs: Its prompts.
        texts: Their texts, where they are echoed.
        options: What the answer has to hold.
    """

    jobs: Sequence[Job]
    texts: Sequence[str]
    options: CompletionOptions


async def create_completion(request: web.Request) -> web.StreamResponse:
    """Completes one or more prompts."""
    server, body, num_tokens = await receive(request, CompletionRequest)
    check(server, body)
    num_sequences = len(body.prompt) * (body.n or 1)
    with open_call(request, server, num_sequences, num_tokens) as call:
        salt = cache_salt(request, body)
        async with opened(server, call, body, salt) as answer:
            if body.stream:
                stream = EventStream(request, server.config)
                await stream.send_all(answer.events(body))
                return stream.response
            return json_response(await answer.whole())


@contextlib.asynccontextmanager
async def opened(
    server: Server, call: Call, body: CompletionRequest, salt: str | None
) -> AsyncGenerator["CompletionAnswer"]:
    """Queues a checked request; gives what makes its answer.

    Raises:
        ApiError: A field is wrong, or the engine refuses it.
    """
    call.max_tokens = _max_tokens(body)
    async with call.limit():
        plan = await _plan(server, body, salt)
    names = _field_names(body)
    running = Generation(server, call, plan.jobs, names, body.stream_interval)
    with contextlib.closing(running):
        await running.open()
        envelope = Envelope(
            f"cmpl-{body.request_id}" if body.request_id else new_id("cmpl-"),
            "text_completion",
            server.check_model(body.model),
            server.fingerprint,
        )
        yield CompletionAnswer(envelope, call, running, plan)


class CompletionAnswer:
    """Makes the answer to one request."""

    def __init__(
        self, envelope: Envelope, call: Call, running: Generation, plan: Plan
    ) -> None:
        self._envelope = envelope
        self._call = call
        self._running = running
        self._options = plan.options
        self._choices: list[CompletionChoice] = []
        prompts = zip(plan.jobs, plan.texts, running.prompt_token_ids, strict=True)
        for job, text, tokens in prompts:
            for _ in range(job.num_outputs):
                index = len(self._choices)
                choice = CompletionChoice(index, plan.options, text, tokens)
                self._choices.append(choice)

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        async with self._call.limit():
            found = [
                self._choices[piece.index].whole(piece)
                async for piece in self._running.pieces()
            ]
        found.sort(key=lambda choice: choice["index"])
        return self._envelope.wrap(found, usage=self._usage())

    async def events(self, body: CompletionRequest) -> AsyncGenerator[bytes, None]:
        """The answer in chunks."""
        options = body.stream_options
        counts = options is not None and bool(options.include_usage)
        always = options is not None and bool(options.continuous_usage_stats)
        frame, counted = ChunkFrame(self._envelope).frame, "null" if counts else None
        async for piece in self._running.pieces():
            if always:
                counted = to_json(self._usage())
            chunks = self._choices[piece.index].chunks(piece)
            yield b"".join([frame(chunk, counted) for chunk in chunks])
        if counts:
            yield frame("", to_json(self._usage()))

    def _usage(self) -> dict[str, Any]:
        generated = 0 if self._options.scores_only else None
        return usage(self._call, generated)


def _field_names(body: CompletionRequest) -> FieldNames:
    """What the request calls the engine's parameters."""
    names = {"prompt_token_ids": "prompt", "structured_outputs": constraint_name(body)}
    return FieldNames(names)


def check(server: Server, body: CompletionRequest) -> None:
    """Refuses what needs no model to be known as wrong.

    Raises:
        ApiError: Names the field.
    """
    server.check_model(body.model)
    check_stream_options(body)
    n, best_of = body.n or 1, body.best_of
    if best_of is not None and best_of > 1 and body.stream:
        raise bad_request("best_of cannot be streamed", "best_of", "invalid_value")
    if best_of not in (None, 1, n) or (best_of == 1 and n > 1):
        raise bad_request(
            f"best_of={best_of} must equal n={n}", "best_of", "invalid_value"
        )


def _max_tokens(body: CompletionRequest) -> int:
    return DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens


async def _plan(server: Server, body: CompletionRequest, salt: str | None) -> Plan:
    llm, max_tokens = server.llm, _max_tokens(body)
    with engine_errors(_field_names(body)):
        settings: dict[str, Any] = {}
        if body.thinking_token_budget is not None:
            settings["reasoning_parser"] = server.parsing.reasoning
        if body.echo and body.logprobs is not None:
            settings["prompt_logprobs"] = body.logprobs
        params = make_params(
            body,
            llm.get_default_sampling_params(),
            is_stream=bool(body.stream),
            # The engine generates at least one token, which is then not shown.
            max_tokens=max(max_tokens, 1),
            logprobs=body.logprobs,
            structured_outputs=structured_outputs(body),
            **settings,
        )
        texts = await _texts(server, body)
        prompts = [await make_prompt(server, body, one, salt) for one in body.prompt]
    jobs = [make_job(p, params, body.n or 1, body.priority) for p in prompts]
    options = CompletionOptions(
        names=TokenNames(llm, as_ids=bool(body.return_tokens_as_token_ids)),
        echo=bool(body.echo),
        wants_logprobs=body.logprobs is not None,
        wants_prompt_logprobs=body.prompt_logprobs is not None,
        wants_token_ids=bool(body.return_token_ids),
        scores_only=max_tokens == 0,
    )
    return Plan(jobs, texts, options)


async def _texts(server: Server, body: CompletionRequest) -> list[str]:
    """Texts of the prompts where they are echoed; tokens are put into words."""
    if not body.echo:
        return [""] * len(body.prompt)
    for prompt in body.prompt:
        bad = [] if isinstance(prompt, str) else _outside(server, prompt)
        if bad:
            raise bad_request(
                f"prompt holds {bad[0]}, which is out of vocabulary",
                "prompt",
                "invalid_value",
            )
    return list(
        await asyncio.gather(*(_text(server, prompt) for prompt in body.prompt))
    )


def _outside(server: Server, tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if token >= server.llm.vocab_size]


async def _text(server: Server, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    return await server.llm.detokenize(prompt)
