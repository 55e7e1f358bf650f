"""Requests and answers of /tokenize and /detokenize."""

from typing import Annotated

from pydantic import Field

from server.protocol.base import AnswerModel, Name, RequestModel, TokenId
from server.protocol.chat import Messages, TemplateFields
from server.protocol.tools import Tool


class TokenizeRequest(TemplateFields):
    """A text or a conversation to split into tokens; exactly one of the two."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: list[Tool] | None = None


class TokenizeResponse(AnswerModel):
    """The tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    """Tokens to join into text."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=10_000_000)]


class DetokenizeResponse(AnswerModel):
    """The text."""

    prompt: str
