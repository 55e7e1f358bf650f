"""Requests and answers of /v1/embeddings."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.protocol.base import (
    INT32_MAX,
    AnswerModel,
    CountOrAll,
    Name,
    PositiveCount,
    RequestModel,
)
from server.protocol.completions import MAX_PROMPTS, read_prompts

TEXT = {"type": "string", "minLength": 1}
TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
INPUT_SCHEMA = {
    "anyOf": [
        TEXT,
        {"type": "array", "items": TEXT, "minItems": 1, "maxItems": MAX_PROMPTS},
        TOKENS,
        {"type": "array", "items": TOKENS, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}


def _read_input(value: Any) -> list[str | list[int]]:
    inputs = read_prompts(value)
    if "" in inputs:
        raise PydanticCustomError("string_too_short", "must not hold an empty string")
    return inputs


class EmbeddingRequest(RequestModel):
    """Body of a request for embeddings, in the words of OpenAI and of vLLM.

    `use_activation` is vLLM's other name of `normalize`.
    """

    input: Annotated[
        list[Any], BeforeValidator(_read_input), WithJsonSchema(INPUT_SCHEMA)
    ]
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: PositiveCount | None = None
    user: Name | None = None
    pooling: Literal["last", "mean", "cls"] | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: CountOrAll | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=INT32_MAX)] | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None


class Embedding(AnswerModel):
    """One embedding: numbers, or the base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(AnswerModel):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(AnswerModel):
    """The embeddings of all inputs, in their order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
