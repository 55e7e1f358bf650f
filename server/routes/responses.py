"""/v1/responses: create, stream, retrieve, cancel, delete."""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from aiohttp import web

from jllm import SamplingParams
from server.answer import json_response, usage
from server.auth import KEY_HASH
from server.call import ARRIVAL, Call, open_call, reserve_call
from server.chat_output import ChatOptions
from server.errors import ApiError, FieldNames, bad_request, unsupported
from server.generation import Generation, Job
from server.logprobs import TokenNames
from server.protocol.chat import TemplateFields
from server.protocol.messages import read_messages
from server.protocol.responses import ResponsesRequest
from server.protocol.unsupported import UNSUPPORTED_IN_RESPONSES
from server.responses_output import ResponseWriter, as_messages
from server.routes.chat import render
from server.routes.common import cache_salt, make_job, parsed_output, receive
from server.sampling import format_constraint, make_params, one_constraint
from server.sse import EventStream
from server.state import SERVER, Server, new_secret_id
from server.submission import engine_errors

logger = logging.getLogger("jllm.server")

NAMES = {
    "prompt": "input",
    "prompt_token_ids": "input",
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
}


@dataclasses.dataclass(slots=True)
class Task:
    """A response that is being made.

    Attributes:
        server: Has the model.
        body: What was asked.
        model: Name that the request used.
        messages: The whole conversation.
        owner: Digest of the key it was asked with; others do not see it.
        salt: Prompts share cached blocks only under the same one.
    """

    server: Server
    body: ResponsesRequest
    model: str
    messages: list[dict[str, Any]]
    owner: str | None
    salt: str | None

    @property
    def is_stored(self) -> bool:
        """Whether the response can be retrieved."""
        return self.server.store.is_enabled and self.body.store is not False

    def keep(self, response: dict[str, Any], *, is_running: bool = False) -> bool:
        """Stores the response as it is now, with the conversation up to its end.

        Returns:
            Whether it can be retrieved now.
        """
        if not self.is_stored:
            return False
        messages = [*self.messages, *as_messages(response["output"])]
        return self.server.store.put(
            response["id"],
            {"response": response, "messages": messages, "owner": self.owner},
            is_running=is_running,
        )


async def create_response(request: web.Request) -> web.StreamResponse:
    """Makes a response: at once, as a stream, or in the background."""
    server, body, num_tokens = await receive(request, ResponsesRequest)
    model = server.check_model(body.model)
    _check(server, body)
    task = Task(
        server,
        body,
        model,
        _conversation(request, server, body),
        request.get(KEY_HASH),
        cache_salt(request, body),
    )
    if body.background:
        return await _start_background(request, task, num_tokens)
    with open_call(request, server, 1, num_tokens) as call:
        async with call.limit():
            job, writer = await _plan(task)
        call.max_tokens = body.max_output_tokens
        running = Generation(server, call, [job], _field_names(body))
        with contextlib.closing(running):
            await running.open()
            events = _events(task, call, running, writer)
            if not body.stream:
                async with call.limit():
                    async for _ in events:
                        pass
                return json_response(writer.response)
            stream = EventStream(
                request,
                server.config,
                done=b"",
                frame_error=lambda error: writer.error_event(_error_fields(error)),
            )
            await stream.send_all(events)
            return stream.response


async def show_response(request: web.Request) -> web.Response:
    """Retrieves a stored response."""
    return json_response(_stored(request)["response"])


async def delete_response(request: web.Request) -> web.Response:
    """Forgets a stored response; one that is being made is cancelled."""
    entry = _stored(request)
    name = entry["response"]["id"]
    server = request.app[SERVER]
    if (task := server.background.get(name)) is not None:
        task.cancel()
    server.store.delete(name)
    return json_response({"id": name, "object": "response", "deleted": True})


async def cancel_response(request: web.Request) -> web.Response:
    """Ends a response that is made in the background."""
    entry = _stored(request)
    response = entry["response"]
    if not response["background"]:
        raise bad_request(
            "only responses made in the background can be cancelled", "response_id"
        )
    task = request.app[SERVER].background.get(response["id"])
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
    return json_response(response)


async def _start_background(
    request: web.Request, task: Task, num_tokens: int
) -> web.Response:
    """Answers at once; the response is made by a task of its own."""
    if not task.is_stored:
        raise bad_request("background needs store=true", "background", "invalid_value")
    _, writer = planned = await _plan(task)
    response = writer.response
    response["status"] = "queued"
    reserved = contextlib.ExitStack()
    origin = (response["id"], request[ARRIVAL])
    call = reserved.enter_context(reserve_call(task.server, origin, 1, num_tokens))
    if not task.keep(response, is_running=True):
        reserved.close()
        raise ApiError(
            429,
            "the responses that are being made in the background leave no room",
            type="rate_limit_error",
            code="store_full",
            headers={"Retry-After": "5"},
        )
    made = asyncio.create_task(_run_background(task, call, planned, reserved))
    task.server.background[response["id"]] = made
    made.add_done_callback(lambda _: task.server.background.pop(response["id"], None))
    return json_response(response)


async def _run_background(
    task: Task,
    call: Call,
    planned: tuple[Job, ResponseWriter],
    reserved: contextlib.ExitStack,
) -> None:
    job, writer = planned
    response, names = writer.response, _field_names(task.body)
    running = Generation(task.server, call, [job], names)
    with reserved, contextlib.closing(running):
        try:
            await running.open()
            async with call.limit():
                async for _ in _events(task, call, running, writer):
                    pass
        except asyncio.CancelledError:
            response["status"] = "cancelled"
        except ApiError as error:
            response |= {"status": "failed", "error": _error_of(error)}
        # Nobody waits for the task: what went wrong is told when they ask.
        except Exception:
            logger.exception("response %s failed", response["id"])
            error = {"code": "server_error", "message": "Internal error"}
            response |= {"status": "failed", "error": error}
        finally:
            # A response that was deleted meanwhile does not come back.
            if task.server.store.get(response["id"]) is not None:
                task.keep(response)


async def _events(
    task: Task, call: Call, running: Generation, writer: ResponseWriter
) -> AsyncGenerator[bytes, None]:
    """Runs the generation to its end, and stores the response."""
    for item in writer.begin():
        yield item
    reason = None
    async for piece in running.pieces():
        for item in writer.push(piece.completion):
            yield item
        reason = piece.completion.finish_reason
    if writer.reasoning:
        tokens = await task.server.llm.tokenize(
            writer.reasoning, add_special_tokens=False
        )
        call.num_reasoning_tokens = len(tokens)
    end = writer.finish(reason, _usage(call))
    task.keep(writer.response)
    for item in end:
        yield item


def _check(server: Server, body: ResponsesRequest) -> None:
    for name in UNSUPPORTED_IN_RESPONSES:
        if (body.model_extra or {}).get(name) is not None:
            raise unsupported(name)
    if body.background and body.stream:
        raise unsupported("background", "background and stream exclude each other")
    options = body.stream_options
    if options is not None and not body.stream:
        raise bad_request(
            "stream_options needs stream=true", "stream_options", "invalid_value"
        )
    # The last event tells the usage in any case.
    for name in type(options).model_fields if options is not None else ():
        if getattr(options, name):
            raise unsupported(f"stream_options.{name}")
    if body.previous_response_id is not None and not server.store.is_enabled:
        raise unsupported("previous_response_id", "this server stores no responses")


def _conversation(
    request: web.Request, server: Server, body: ResponsesRequest
) -> list[dict[str, Any]]:
    """All messages, those of the previous responses first; instructions not included.

    Raises:
        ApiError: The previous response is not known.
    """
    if body.previous_response_id is None:
        return body.input
    entry = server.store.get(body.previous_response_id)
    if entry is None or entry["owner"] != request.get(KEY_HASH):
        raise _not_found("previous_response_id", body.previous_response_id)
    return [*read_messages(entry["messages"]), *body.input]


async def _plan(task: Task) -> tuple[Job, ResponseWriter]:
    server, body = task.server, task.body
    tools = [tool.as_chat_tool() for tool in body.tools or ()]
    choice = server.parsing.check_choice(tools, body.tool_choice)
    if choice == "none":
        tools = []
    system: list[dict[str, Any]] = []
    if body.instructions is not None:
        system.append({"role": "system", "content": body.instructions})
    with engine_errors(_field_names(body)):
        params = _params(server, body, tools, choice)
        prompt = await render(
            server,
            TemplateFields(chat_template_kwargs=body.chat_template_kwargs),
            system + task.messages,
            tools,
            reasoning_effort=body.reasoning.effort if body.reasoning else None,
        )
    if task.salt is not None:
        prompt = dataclasses.replace(prompt, cache_salt=task.salt)
    options = ChatOptions(
        names=TokenNames(server.llm),
        num_top=params.logprobs,
        include_reasoning=body.include_reasoning is not False,
        parallel_tool_calls=body.parallel_tool_calls is not False,
    )
    parser = server.parsing.make(tools, prompt.text or "", is_stream=bool(body.stream))
    writer = ResponseWriter(_head(task, params), parser, options)
    return make_job(prompt, params, 1, body.priority), writer


def _field_names(body: ResponsesRequest) -> FieldNames:
    """What the request calls the engine's parameters."""
    form = "tools"
    if body.structured_outputs is not None:
        form = "structured_outputs"
    elif body.text is not None and body.text.format is not None:
        form = "text.format"
    return FieldNames(NAMES | {"structured_outputs": form})


def _params(
    server: Server, body: ResponsesRequest, tools: list[dict[str, Any]], choice: Any
) -> SamplingParams:
    asked = None
    if body.text is not None and body.text.format is not None:
        asked = format_constraint("text.format", body.text.format)
    settings = parsed_output(
        server,
        one_constraint(asked, body.structured_outputs),
        tools,
        choice,
        parallel=body.parallel_tool_calls is not False,
        form_field="text.format",
    )
    return make_params(
        body,
        server.llm.get_default_sampling_params(),
        is_stream=bool(body.stream),
        max_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if body.include else None,
        **settings,
    )


def _head(task: Task, params: SamplingParams) -> dict[str, Any]:
    """The response before it has any output."""
    body = task.body
    effort = body.reasoning.effort if body.reasoning else None
    text = body.text.format if body.text and body.text.format else {"type": "text"}
    choice = body.tool_choice or "auto"
    if isinstance(choice, dict):
        choice = {"type": "function", "name": choice["function"]}
    return {
        "id": new_secret_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": task.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": effort, "summary": None},
        "store": task.is_stored,
        "temperature": params.temperature,
        "text": {"format": text},
        "tool_choice": choice,
        "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _usage(call: Call) -> dict[str, Any]:
    """Counts of tokens under the names that this API has for them."""
    counts = usage(call)
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": counts["prompt_tokens_details"],
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": counts["completion_tokens_details"],
        "total_tokens": counts["total_tokens"],
    }


def _stored(request: web.Request) -> dict[str, Any]:
    name = request.match_info["id"]
    entry = request.app[SERVER].store.get(name)
    if entry is None or entry["owner"] != request.get(KEY_HASH):
        raise _not_found("response_id", name)
    return entry


def _not_found(param: str, name: str) -> ApiError:
    return ApiError(
        404,
        f"no response {name[:100]!r} is stored",
        param=param,
        code="response_not_found",
    )


def _error_of(error: ApiError) -> dict[str, Any]:
    return {"code": error.code or "server_error", "message": error.message}


def _error_fields(error: ApiError) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "param": error.param}
