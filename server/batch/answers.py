"""Answers lines of a job as the server answers requests, in OpenAI's batch format."""

import dataclasses
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pydantic import BaseModel

from jllm import EngineStoppedError
from jllm.batch import Answer, Line
from server.body import parse
from server.call import Call, reserve_call
from server.errors import ApiError, bad_request, internal
from server.protocol.chat import ChatCompletionRequest
from server.protocol.completions import CompletionRequest
from server.protocol.embeddings import EmbeddingRequest
from server.routes import chat, completions, embeddings
from server.routes.common import BYTES_PER_TOKEN
from server.state import Server

logger = logging.getLogger("jllm.server")

PASSING = (429, 503)
"""Statuses that say nothing about the request; its line is not done."""


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """An API that lines may ask.

    Attributes:
        kind: What a body must be.
        from_prompt: Makes the fields of a body from a plain prompt.
        check: Refuses what is wrong with a body.
        count: How many outputs it asks for.
        answer: Makes the body of the answer.
    """

    kind: type[BaseModel]
    from_prompt: Callable[[str], dict[str, Any]]
    check: Callable[[Server, Any], None]
    count: Callable[[Any], int]
    answer: Callable[[Server, Call, Any], Awaitable[dict[str, Any]]]


async def _chat(
    server: Server, call: Call, body: ChatCompletionRequest
) -> dict[str, Any]:
    async with chat.opened(server, call, body, body.cache_salt) as answer:
        return await answer.whole(body)


async def _completion(
    server: Server, call: Call, body: CompletionRequest
) -> dict[str, Any]:
    async with completions.opened(server, call, body, body.cache_salt) as answer:
        return await answer.whole()


async def _embedding(
    server: Server, call: Call, body: EmbeddingRequest
) -> dict[str, Any]:
    answer = await embeddings.embed(server, call, body, body.cache_salt)
    return answer.whole()


ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/chat/completions": Endpoint(
        ChatCompletionRequest,
        lambda text: {"messages": [{"role": "user", "content": text}]},
        chat.check,
        lambda body: body.n or 1,
        _chat,
    ),
    "/v1/completions": Endpoint(
        CompletionRequest,
        lambda text: {"prompt": text},
        completions.check,
        lambda body: len(body.prompt) * (body.n or 1),
        _completion,
    ),
    "/v1/embeddings": Endpoint(
        EmbeddingRequest,
        lambda text: {"input": text},
        embeddings.check,
        lambda body: len(body.input),
        _embedding,
    ),
}


class Answers:
    """Answers lines with a model."""

    def __init__(
        self, server: Server, endpoint: str, fields: Mapping[str, Any]
    ) -> None:
        """Takes over the state of a server whose model is loaded.

        Args:
            server: The state.
            endpoint: API that plain prompts are for.
            fields: Fields of the body of every plain prompt.
        """
        self._server = server
        self._endpoint = endpoint
        self._fields = fields

    async def __call__(self, line: Line) -> Answer:
        """Answers one line; a bad one has an error for an answer.

        Raises:
            EngineStoppedError: The engine cannot go on; the line is not answered.
        """
        if line.problem is not None:
            return _refused(line, "invalid_line", line.problem)
        url = line.url or self._endpoint
        endpoint = ENDPOINTS.get(url)
        if endpoint is None:
            names = ", ".join(ENDPOINTS)
            return _refused(line, "invalid_url", f"url must be one of {names}")
        try:
            return await self._ask(line, endpoint)
        except ApiError as error:
            if error.status in PASSING:
                raise EngineStoppedError(error.message) from error
            return _responded(line, error.status, error.body)
        except Exception:
            logger.exception("line %d failed", line.number)
            error = internal(_id(line))
            return _responded(line, error.status, error.body)

    async def _ask(self, line: Line, endpoint: Endpoint) -> Answer:
        raw = json.dumps(self._body(line, endpoint)).encode()
        body: Any = parse(
            raw, endpoint.kind, strict_fields=self._server.config.strict_fields
        )
        if getattr(body, "stream", None):
            raise bad_request("a batch cannot stream", "stream", "invalid_value")
        endpoint.check(self._server, body)
        origin = _id(line), time.monotonic()
        num_tokens = len(raw) // BYTES_PER_TOKEN + 1
        count = endpoint.count(body)
        with reserve_call(self._server, origin, count, num_tokens) as call:
            answer = await endpoint.answer(self._server, call, body)
        return _responded(line, 200, answer, call)

    def _body(self, line: Line, endpoint: Endpoint) -> dict[str, Any]:
        """The body sent; without a name it gets the line's, the same every time."""
        if isinstance(line.body, str):
            fields = dict(self._fields) | endpoint.from_prompt(line.body)
        else:
            fields = dict(line.body or {})
        if fields.get("request_id") is None:
            fields["request_id"] = line.key
        return fields


def _id(line: Line) -> str:
    return f"batch_req_{line.key}"


def _responded(
    line: Line, status: int, body: Mapping[str, Any], call: Call | None = None
) -> Answer:
    response = {"status_code": status, "request_id": _id(line), "body": body}
    return Answer(
        {
            "id": _id(line),
            "custom_id": line.custom_id,
            "response": response,
            "error": None,
        },
        is_error=status != 200,
        num_prompt_tokens=call.num_prompt_tokens if call else 0,
        num_output_tokens=call.num_output_tokens if call else 0,
    )


def _refused(line: Line, code: str, message: str) -> Answer:
    return Answer(
        {
            "id": _id(line),
            "custom_id": line.custom_id,
            "response": None,
            "error": {"code": code, "message": f"line {line.number}: {message}"},
        },
        is_error=True,
    )
