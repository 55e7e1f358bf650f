"""Requests and answers of /v1/completions."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.protocol.base import (
    INT32_MAX,
    AnswerModel,
    CommonFields,
    Count,
    Usage,
)

MAX_PROMPTS = 2048
MAX_LOGPROBS = 20


def _is_token(value: Any) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer and 0 <= value <= INT32_MAX


def read_prompts(value: Any) -> list[str | list[int]]:
    """All forms as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError("prompt_type", "must be a string or a list")
    if not value:
        raise PydanticCustomError("empty_array", "must not be an empty list")
    if isinstance(value[0], (str, list)):
        return _read_list(value)
    _check_tokens(value)
    return [value]


def _read_list(values: list[Any]) -> list[str | list[int]]:
    if len(values) > MAX_PROMPTS:
        raise PydanticCustomError(
            "too_long", "must hold at most {most} prompts", {"most": MAX_PROMPTS}
        )
    kind = type(values[0])
    for value in values:
        if not isinstance(value, kind):
            raise PydanticCustomError("prompt_type", "must hold prompts of one kind")
        if isinstance(value, list):
            if not value:
                raise PydanticCustomError("empty_array", "must not hold an empty list")
            _check_tokens(value)
    return values


def _check_tokens(values: list[Any]) -> None:
    for value in values:
        if not _is_token(value):
            raise PydanticCustomError(
                "prompt_token",
                "holds {value}, which is out of vocabulary: no token id",
                {"value": repr(value)[:40]},
            )


PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {"type": "string"},
            "minItems": 1,
            "maxItems": MAX_PROMPTS,
        },
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0},
                "minItems": 1,
            },
            "minItems": 1,
            "maxItems": MAX_PROMPTS,
        },
    ]
}


class CompletionRequest(CommonFields):
    """Body of a request to complete text."""

    prompt: Annotated[
        list[Any], BeforeValidator(read_prompts), WithJsonSchema(PROMPT_SCHEMA)
    ]
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionLogprobs(AnswerModel):
    """Log-probabilities as parallel lists, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(AnswerModel):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class CompletionResponse(AnswerModel):
    """All completions of a request; a chunk of a stream has the same form."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChoice]
    usage: Usage | None = None
