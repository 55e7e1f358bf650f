"""POST /v1/embeddings."""

import asyncio
import base64
import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from jllm import EmbeddingRequestOutput, PoolingParams
from server.answer import json_response
from server.call import Call, open_call
from server.errors import (
    FieldNames,
    bad_request,
    failed_sequence,
    unavailable,
    unsupported,
)
from server.protocol.embeddings import EmbeddingRequest
from server.routes.common import cache_salt, make_prompt, receive
from server.state import Server, new_id
from server.submission import Submission, engine_errors

NAMES = FieldNames({"prompt": "input", "prompt_token_ids": "input"})
MOST_NUMBERS_AT_ONCE = 16_384
"""Numbers from which an answer is written beside the event loop."""


@dataclasses.dataclass(frozen=True, slots=True)
class PooledInput:
    """One input.

    Attributes:
        prompt: See `jllm.LLM.generate`.
        params: How it is pooled.
        priority: Smaller runs first.
    """

    prompt: Any
    params: PoolingParams
    priority: int = 0


async def create_embedding(request: web.Request) -> web.Response:
    """Embeds one or more inputs."""
    server, body, num_tokens = await receive(request, EmbeddingRequest)
    check(server, body)
    with open_call(request, server, len(body.input), num_tokens) as call:
        answer = await embed(server, call, body, cache_salt(request, body))
        if answer.size < MOST_NUMBERS_AT_ONCE:
            return json_response(answer.whole())
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            server.executor, lambda: json_response(answer.whole())
        )


def check(server: Server, body: EmbeddingRequest) -> None:
    """Refuses what needs no model to be known as wrong.

    Raises:
        ApiError: Names the field.
    """
    server.check_model(body.model)
    if "messages" in (body.model_extra or {}):
        raise unsupported("messages")


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddingAnswer:
    """An answer whose numbers are still to be written.

    Attributes:
        fields: All but the vectors.
        embeddings: The vectors.
        as_text: Whether they are written in base 64.
    """

    fields: dict[str, Any]
    embeddings: Sequence[Any]
    as_text: bool

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return sum(map(len, self.embeddings))

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": _encode(vector, self.as_text),
            }
            for i, vector in enumerate(self.embeddings)
        ]
        return self.fields | {"data": data}


async def embed(
    server: Server, call: Call, body: EmbeddingRequest, salt: str | None
) -> EmbeddingAnswer:
    """Runs a checked request.

    Raises:
        ApiError: A field is wrong, or the engine refuses it.
    """
    async with call.limit():
        inputs = await _inputs(server, body, salt)
    submission = Submission(server, call, inputs, NAMES)
    with contextlib.closing(submission):
        await submission.open()
        async with call.limit():
            embeddings = await _collect(submission, call, len(inputs))
    count = call.num_prompt_tokens
    fields = {
        "id": f"embd-{body.request_id}" if body.request_id else new_id("embd-"),
        "object": "list",
        "created": int(time.time()),
        "model": server.check_model(body.model),
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }
    return EmbeddingAnswer(fields, embeddings, body.encoding_format == "base64")


async def _inputs(
    server: Server, body: EmbeddingRequest, salt: str | None
) -> list[PooledInput]:
    with engine_errors(NAMES):
        params = PoolingParams(
            pooling=body.pooling or "last",
            normalize=_normalize(body),
            dimensions=body.dimensions,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
        )
        prompts = [await make_prompt(server, body, one, salt) for one in body.input]
    return [PooledInput(prompt, params, body.priority or 0) for prompt in prompts]


def _normalize(body: EmbeddingRequest) -> bool:
    given = {body.normalize, body.use_activation} - {None}
    if len(given) > 1:
        raise bad_request(
            "normalize and use_activation contradict each other",
            "use_activation",
            "invalid_value",
        )
    return False not in given


async def _collect(submission: Submission, call: Call, count: int) -> list[Any]:
    """Waits for all embeddings, and counts them.

    Raises:
        ApiError: The engine has failed, or could not go on with one of the inputs.
    """
    found: list[Any] = [None] * count
    with engine_errors(NAMES):
        async for i, output in submission.merged():
            found[i] = _vector(output)
            call.num_cached_tokens += output.num_cached_tokens or 0
            call.reasons.append("stop")
            if call.scheduled_time is None and output.metrics is not None:
                call.scheduled_time = output.metrics.scheduled_time
    return found


def _vector(output: EmbeddingRequestOutput) -> Any:
    reason = output.outputs.finish_reason
    if reason == "error":
        raise failed_sequence()
    if reason == "abort":
        raise unavailable("the request was ended by the server", "aborted")
    return output.outputs.embedding


def _encode(vector: Any, as_text: bool) -> list[float] | str:  # noqa: FBT001
    if as_text:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return vector.tolist()
