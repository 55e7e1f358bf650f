"""POST /tokenize and /detokenize."""

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web

from server.answer import json_response
from server.errors import FieldNames, bad_request
from server.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from server.routes.chat import NAMES, render
from server.routes.common import receive
from server.state import Server
from server.submission import engine_errors

MOST_TOKENS_AT_ONCE = 4096
"""Tokens that are written in the event loop."""


async def tokenize(request: web.Request) -> web.Response:
    """Splits a text or a conversation into tokens."""
    server, body, _ = await receive(request, TokenizeRequest, queues=False)
    if body.model is not None:
        server.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request(
            "give either prompt or messages", "prompt", "missing_required_parameter"
        )
    llm = server.llm
    with engine_errors(FieldNames(NAMES if body.messages else {})):
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            tokens = await llm.tokenize(body.prompt, add_special_tokens=special)
        else:
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
            prompt = await render(server, body, body.messages or [], tools)
            tokens = list(prompt.token_ids)

    def respond() -> web.Response:
        answer: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": llm.max_model_len,
            "tokens": tokens,
        }
        if body.return_token_strs:
            answer["token_strs"] = [llm.token_text(token) for token in tokens]
        return json_response(answer)

    return await _beside(server, len(tokens), respond)


async def detokenize(request: web.Request) -> web.Response:
    """Joins tokens into text."""
    server, body, _ = await receive(request, DetokenizeRequest, queues=False)
    if body.model is not None:
        server.check_model(body.model)
    highest = max(body.tokens, default=0)
    if highest >= server.llm.vocab_size:
        raise bad_request(
            f"tokens holds {highest}, which is out of vocabulary",
            "tokens",
            "invalid_value",
        )
    with engine_errors(FieldNames()):
        return json_response({"prompt": await server.llm.detokenize(body.tokens)})


async def _beside(
    server: Server, num_tokens: int, respond: Callable[[], web.Response]
) -> web.Response:
    """Makes an answer, a long one beside the event loop."""
    if num_tokens < MOST_TOKENS_AT_ONCE:
        return respond()
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(server.executor, respond)
