"""POST /v1/chat/completions."""

import contextlib
import dataclasses
import json
from collections.abc import AsyncGenerator
from typing import Any

from aiohttp import web

from jllm import SamplingParams
from server.answer import ChunkFrame, Envelope, json_response, to_json, usage
from server.call import Call, open_call
from server.chat_output import ChatChoice, ChatOptions
from server.errors import FieldNames, bad_request
from server.generation import Generation, Job
from server.logprobs import TokenNames, prompt_logprobs
from server.protocol.chat import ChatCompletionRequest, TemplateFields
from server.routes.common import (
    MAX_TEMPLATE_BYTES,
    cache_salt,
    check_stream_options,
    make_job,
    parsed_output,
    receive,
)
from server.sampling import constraint_name, make_params, structured_outputs
from server.sse import EventStream
from server.state import Server, new_id
from server.submission import engine_errors

NAMES = {"prompt": "messages", "prompt_token_ids": "messages"}


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A checked request.

    Attributes:
        job: Its prompt.
        prompt_text: The prompt as rendered.
        tools: Those that the model may call.
        options: What the answer has to hold.
    """

    job: Job
    prompt_text: str
    tools: list[dict[str, Any]]
    options: ChatOptions


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    """Continues a conversation."""
    server, body, num_tokens = await receive(request, ChatCompletionRequest)
    check(server, body)
    with open_call(request, server, body.n or 1, num_tokens) as call:
        salt = cache_salt(request, body)
        async with opened(server, call, body, salt) as answer:
            if body.stream:
                stream = EventStream(request, server.config)
                await stream.send_all(answer.events(body))
                return stream.response
            return json_response(await answer.whole(body))


@contextlib.asynccontextmanager
async def opened(
    server: Server, call: Call, body: ChatCompletionRequest, salt: str | None
) -> AsyncGenerator["ChatAnswer"]:
    """Queues a checked request; gives what makes its answer.

    Raises:
        ApiError: A field is wrong, or the engine refuses it.
    """
    call.max_tokens = body.max_completion_tokens or body.max_tokens
    names = field_names(body)
    async with call.limit():
        plan = await _plan(server, body, names, salt)
    running = Generation(server, call, [plan.job], names, body.stream_interval)
    with contextlib.closing(running):
        await running.open()
        envelope = Envelope(
            _name(body),
            "chat.completion.chunk" if body.stream else "chat.completion",
            server.check_model(body.model),
            server.fingerprint,
        )
        yield ChatAnswer(
            envelope, call, running, plan, server, is_stream=bool(body.stream)
        )


class ChatAnswer:
    """Makes the answer to one request."""

    def __init__(
        self,
        envelope: Envelope,
        call: Call,
        running: Generation,
        plan: Plan,
        server: Server,
        *,
        is_stream: bool,
    ) -> None:
        self._envelope = envelope
        self._call = call
        self._running = running
        self._names = plan.options.names
        self._llm = server.llm
        self._choices: list[ChatChoice] = []
        for i in range(plan.job.num_outputs):
            parser = server.parsing.make(
                plan.tools, plan.prompt_text, is_stream=is_stream
            )
            self._choices.append(ChatChoice(i, parser, plan.options))

    async def whole(self, body: ChatCompletionRequest) -> dict[str, Any]:
        """The answer in one piece."""
        async with self._call.limit():
            pieces = [piece async for piece in self._running.pieces()]
            pieces.sort(key=lambda piece: piece.index)
            found = [self._choices[p.index].whole(p.completion) for p in pieces]
            await self._count_reasoning()
        more: dict[str, Any] = {"usage": usage(self._call)}
        if body.prompt_logprobs is not None:
            scores = pieces[0].prompt_logprobs
            more["prompt_logprobs"] = prompt_logprobs(scores, self._names)
        if body.return_token_ids:
            more["prompt_token_ids"] = list(self._running.prompt_token_ids[0])
        return self._envelope.wrap(found, **more)

    async def events(self, body: ChatCompletionRequest) -> AsyncGenerator[bytes, None]:
        """The answer in chunks."""
        options = body.stream_options
        counts = options is not None and bool(options.include_usage)
        always = options is not None and bool(options.continuous_usage_stats)
        frame, counted = ChunkFrame(self._envelope).frame, "null" if counts else None
        async for piece in self._running.pieces():
            if always:
                counted = to_json(usage(self._call))
            chunks = self._choices[piece.index].chunks(piece.completion)
            yield b"".join([frame(chunk, counted) for chunk in chunks])
        if counts:
            await self._count_reasoning()
            yield frame("", to_json(usage(self._call)))

    async def _count_reasoning(self) -> None:
        """Counts the tokens that the reasoning has by itself."""
        for choice in self._choices:
            if choice.reasoning:
                tokens = await self._llm.tokenize(
                    choice.reasoning, add_special_tokens=False
                )
                self._call.num_reasoning_tokens += len(tokens)


def _name(body: ChatCompletionRequest) -> str:
    return f"chatcmpl-{body.request_id}" if body.request_id else new_id("chatcmpl-")


def field_names(body: ChatCompletionRequest) -> FieldNames:
    """What the request calls the engine's parameters."""
    names = NAMES | {"structured_outputs": constraint_name(body)}
    if body.top_logprobs is not None:
        names["logprobs"] = "top_logprobs"
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    return FieldNames(names)


def check(server: Server, body: ChatCompletionRequest) -> None:
    """Refuses what needs no model to be known as wrong.

    Raises:
        ApiError: Names the field.
    """
    server.check_model(body.model)
    check_stream_options(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request(
            "top_logprobs needs logprobs=true", "top_logprobs", "invalid_value"
        )


def check_template(server: Server, body: TemplateFields) -> None:
    """Refuses templates of strangers, and what is too large for one.

    Raises:
        ApiError: Names the field.
    """
    if body.chat_template is not None and not server.config.trust_request_chat_template:
        raise bad_request(
            "chat_template is not accepted in requests: a template is a program",
            "chat_template",
            "unsupported_parameter",
        )
    for name in ("chat_template", "chat_template_kwargs", "documents"):
        value = getattr(body, name)
        if value is not None and len(json.dumps(value)) > MAX_TEMPLATE_BYTES:
            raise bad_request(
                f"{name} is longer than {MAX_TEMPLATE_BYTES} bytes",
                name,
                "string_above_max_length",
            )


async def render(
    server: Server,
    body: TemplateFields,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    **variables: Any,
) -> Any:
    """Renders a conversation to a prompt."""
    check_template(server, body)
    kwargs = dict(body.chat_template_kwargs or {})
    if body.documents is not None:
        kwargs["documents"] = body.documents
    kwargs |= {name: value for name, value in variables.items() if value is not None}
    continues = bool(body.continue_final_message)
    begins = body.add_generation_prompt
    return await server.llm.chat_prompt(
        messages,
        add_generation_prompt=not continues if begins is None else begins,
        continue_final_message=continues,
        chat_template=body.chat_template,
        tools=tools or None,
        add_special_tokens=bool(body.add_special_tokens),
        chat_template_kwargs=kwargs,
    )


async def _plan(
    server: Server, body: ChatCompletionRequest, names: FieldNames, salt: str | None
) -> Plan:
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    choice = server.parsing.check_choice(tools, body.tool_choice)
    if choice == "none":
        tools = []
    with engine_errors(names):
        params = _params(server, body, tools, choice)
        prompt = await render(
            server, body, body.messages, tools, reasoning_effort=body.reasoning_effort
        )
        if salt is not None:
            prompt = dataclasses.replace(prompt, cache_salt=salt)
    num_top = params.logprobs
    if body.logprob_token_ids is not None:
        num_top = -1
    options = ChatOptions(
        names=TokenNames(server.llm, as_ids=bool(body.return_tokens_as_token_ids)),
        num_top=num_top,
        wants_token_ids=bool(body.return_token_ids),
        include_reasoning=body.include_reasoning is not False,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        is_named_tool=isinstance(choice, dict),
        prefix=_echoed(body),
    )
    job = make_job(prompt, params, body.n or 1, body.priority)
    return Plan(job, prompt.text or "", tools, options)


def _params(
    server: Server,
    body: ChatCompletionRequest,
    tools: list[dict[str, Any]],
    choice: Any,
) -> SamplingParams:
    settings = parsed_output(
        server,
        structured_outputs(body),
        tools,
        choice,
        parallel=body.parallel_tool_calls is not False,
        form_field="response_format",
    )
    return make_params(
        body,
        server.llm.get_default_sampling_params(),
        is_stream=bool(body.stream),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        **settings,
    )


def _echoed(body: ChatCompletionRequest) -> str:
    """The open end of the last message, where the answer shall repeat it."""
    last = body.messages[-1]
    if not body.echo or last["role"] != "assistant":
        return ""
    content = last.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content)
