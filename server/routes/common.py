"""What the handlers of inference share: from the body to a place in the queue."""

import dataclasses
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel

from jllm import SamplingParams, StructuredOutputsParams
from server.auth import KEY_HASH
from server.body import parse_body, read_body
from server.errors import bad_request
from server.generation import Job
from server.protocol.base import CommonFields
from server.state import SERVER, Server

BYTES_PER_TOKEN = 4
"""How many bytes of a body are taken for one token before tokens are counted."""
MAX_TEMPLATE_BYTES = 65_536

Body = TypeVar("Body", bound=BaseModel)


async def receive(
    request: web.Request, kind: type[Body], *, queues: bool = True
) -> tuple[Server, Body, int]:
    """Reads and checks a request.

    Args:
        request: The request.
        kind: What its body must be.
        queues: Whether it wants a place in the queue; a full one refuses it unread.

    Returns:
        The server, the body, and about how many tokens its prompt has.

    Raises:
        ApiError: The server does not serve, or the body is wrong.
    """
    server = request.app[SERVER]
    server.check_ready()
    if queues:
        server.admission.check_room()
    raw = await read_body(
        request, timeout=server.config.body_timeout, max_bytes=server.max_body_bytes
    )
    body = await parse_body(
        raw, kind, server.executor, strict_fields=server.config.strict_fields
    )
    estimate = len(raw) // BYTES_PER_TOKEN + 1
    return server, body, min(estimate, server.llm.max_model_len)


def check_stream_options(body: CommonFields) -> None:
    """Refuses options of streams where nothing is streamed, and the reverse.

    Raises:
        ApiError: Names the field.
    """
    options = body.stream_options
    if options is not None and not body.stream:
        raise bad_request(
            "stream_options needs stream=true", "stream_options", "invalid_value"
        )
    if options is not None and options.include_obfuscation:
        raise bad_request(
            "stream_options.include_obfuscation is not supported",
            "stream_options.include_obfuscation",
            "unsupported_parameter",
        )
    if body.stream and body.prompt_logprobs is not None:
        raise bad_request(
            "prompt_logprobs cannot be streamed", "prompt_logprobs", "invalid_value"
        )


def cache_salt(request: web.Request, body: Any) -> str | None:
    """Under which prompts share cached starts: the client's word and its key."""
    salt = body.cache_salt
    if request.app[SERVER].config.isolate_keys and KEY_HASH in request:
        return f"{request[KEY_HASH]}:{salt or ''}"
    return salt


async def make_prompt(
    server: Server, body: Any, prompt: str | list[int], salt: str | None
) -> dict[str, Any]:
    """One prompt of a request, as the engine takes it; see `jllm.LLM.generate`."""
    made: dict[str, Any] = {}
    if salt is not None:
        made["cache_salt"] = salt
    if not isinstance(prompt, str):
        return made | {"prompt_token_ids": prompt}
    made["prompt"] = prompt
    if body.add_special_tokens is False:
        tokens = await server.llm.tokenize(prompt, add_special_tokens=False)
        made["prompt_token_ids"] = tokens
    return made


def parsed_output(
    server: Server,
    form: StructuredOutputsParams | None,
    tools: list[dict[str, Any]],
    choice: Any,
    *,
    parallel: bool,
    form_field: str,
) -> dict[str, Any]:
    """Sampling parameters of an output that is parsed for reasoning and tool calls.

    Args:
        server: Knows how the model writes both.
        form: The form that the request asks for.
        tools: Those that the model may call.
        choice: Which of them it has to call.
        parallel: Whether it may call several.
        form_field: Where the request asks for the form.

    Raises:
        ApiError: A call is required, and another form asked for.
    """
    required = server.parsing.constraint(tools, choice, parallel=parallel)
    if form is not None and required is not None:
        raise bad_request(
            "a required tool call leaves no room for another form of the output",
            form_field,
            "invalid_value",
        )
    settings: dict[str, Any] = {
        "structured_outputs": form or required,
        "reasoning_parser": server.parsing.reasoning,
    }
    if server.parsing.needs_special_tokens(tools):
        # The parser reads them, and leaves the others out of the content.
        settings["skip_special_tokens"] = False
    return settings


def make_job(prompt: Any, params: SamplingParams, n: int, priority: int | None) -> Job:
    """One prompt with `n` outputs; greedy ones are equal and generated once."""
    if not params.is_greedy and n > 1:
        params = dataclasses.replace(params, n=n)
    return Job(prompt, params, n, priority or 0)
