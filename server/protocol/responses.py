"""Requests and answers of /v1/responses."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.protocol.base import (
    AnswerModel,
    Name,
    PositiveCount,
    RequestModel,
    SamplingFields,
    StreamOptions,
)
from server.protocol.messages import FieldError, read_messages
from server.protocol.tools import TOOL_CHOICE_SCHEMA, read_tool_choice

MAX_TOOLS = 128


def _read_input(value: Any) -> list[dict[str, Any]]:
    """Items of a conversation as chat messages."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("list_type", "must be a string or a list of items")
    if not value:
        raise PydanticCustomError("empty_array", "must not be empty")
    messages: list[dict[str, Any]] = []
    try:
        for i, item in enumerate(value):
            _add_item(messages, i, item)
    except FieldError as error:
        context = {"text": str(error), "path": error.path, "word": error.code}
        raise PydanticCustomError("field", "{text}", context) from error
    return read_messages(messages)


def _add_item(messages: list[dict[str, Any]], i: int, item: Any) -> None:
    if not isinstance(item, dict):
        raise FieldError(str(i), "must be an object", "invalid_type")
    kind = item.get("type", "message")
    if kind == "message":
        messages.append({"role": item.get("role"), "content": item.get("content")})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        if messages and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "tool_calls": [call]})
    elif kind == "function_call_output":
        output = item.get("output")
        messages.append(
            {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
        )
    # Reasoning of earlier turns is not shown to the model again, as templates have it.
    elif kind != "reasoning":
        raise FieldError(
            f"{i}.type",
            f"is {str(kind)[:40]!r}: only messages, function calls, their outputs and "
            "reasoning are supported",
            "unsupported_content",
        )


INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "object"}},
    ]
}


class FunctionTool(RequestModel):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def as_chat_tool(self) -> dict[str, Any]:
        """The form of chat completions."""
        function = self.model_dump(exclude_none=True, exclude={"type"})
        return {"type": "function", "function": function}


class Reasoning(RequestModel):
    """How much the model is to think."""

    effort: Annotated[str, Field(max_length=64)] | None = None
    summary: None = None


class TextOptions(RequestModel):
    """The form of the text."""

    format: dict[str, Any] | None = None
    verbosity: Annotated[str, Field(max_length=64)] | None = None


class ResponsesRequest(SamplingFields):
    """Body of a request for a response."""

    model: Name | None = None
    input: Annotated[
        list[dict[str, Any]],
        BeforeValidator(_read_input),
        WithJsonSchema(INPUT_SCHEMA),
    ]
    instructions: str | None = None
    max_output_tokens: PositiveCount | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    background: bool | None = None
    store: bool | None = None
    previous_response_id: Annotated[str, Field(max_length=256)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[
        Any, BeforeValidator(read_tool_choice), WithJsonSchema(TOOL_CHOICE_SCHEMA)
    ] = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    include_reasoning: bool | None = None
    text: TextOptions | None = None
    structured_outputs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    metadata: dict[str, Any] | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    user: Name | None = None
    service_tier: Annotated[str, Field(max_length=64)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    prompt_cache_retention: Annotated[str, Field(max_length=64)] | None = None
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = None


class InputTokensDetails(AnswerModel):
    """Where the tokens of the input came from."""

    cached_tokens: int


class OutputTokensDetails(AnswerModel):
    """What the generated tokens were used for."""

    reasoning_tokens: int


class ResponseUsage(AnswerModel):
    """Counts of tokens."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class Response(AnswerModel):
    """A response, finished or not."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal[
        "queued", "in_progress", "completed", "incomplete", "failed", "cancelled"
    ]
    background: bool
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: str
    usage: ResponseUsage | None
    user: str | None


class DeletedResponse(AnswerModel):
    """Answer to the deletion of a response."""

    id: str
    object: Literal["response"]
    deleted: bool
