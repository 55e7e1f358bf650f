"""Requests and answers of /v1/chat/completions."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.protocol.base import (
    AnswerModel,
    CommonFields,
    PositiveCount,
    RequestModel,
    Usage,
)
from server.protocol.messages import MESSAGES_SCHEMA, read_messages
from server.protocol.tools import TOOL_CHOICE_SCHEMA, Tool, read_tool_choice

MAX_TOOLS = 128

Messages = Annotated[
    list[dict[str, Any]],
    BeforeValidator(read_messages),
    WithJsonSchema(MESSAGES_SCHEMA),
]


class TemplateFields(RequestModel):
    """How a conversation becomes a prompt."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None


class ChatCompletionRequest(TemplateFields, CommonFields):
    """Body of a request to continue a conversation."""

    messages: Messages
    max_tokens: PositiveCount | None = None
    max_completion_tokens: PositiveCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    echo: bool | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[
        Any, BeforeValidator(read_tool_choice), WithJsonSchema(TOOL_CHOICE_SCHEMA)
    ] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    include_reasoning: bool | None = None
    store: bool | None = None
    service_tier: Annotated[str, Field(max_length=64)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    prompt_cache_retention: Annotated[str, Field(max_length=64)] | None = None
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = None
    verbosity: Annotated[str, Field(max_length=64)] | None = None


class TopLogprob(AnswerModel):
    """One of the most probable tokens of a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A generated token."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(AnswerModel):
    """Log-probabilities of the generated tokens."""

    content: list[TokenLogprob] | None
    refusal: None = None


class FunctionCall(AnswerModel):
    """A call of a function; its arguments are JSON."""

    name: str
    arguments: str


class ToolCall(AnswerModel):
    """One call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(AnswerModel):
    """What the model answered."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(AnswerModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionResponse(AnswerModel):
    """All answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None


class ChatChunkChoice(AnswerModel):
    """What is new of one answer."""

    index: int
    delta: dict[str, Any]
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(AnswerModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
