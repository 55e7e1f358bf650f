"""What the requests of all APIs share."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

INT32_MAX = 2**31 - 1
MAX_STOPS = 4
MAX_STOP_LENGTH = 1024
MAX_LOGIT_BIAS = 1024
MAX_N = 128


class RequestModel(BaseModel):
    """A request body or a part of one; JSON types are taken as they are.

    Unknown fields are kept in `model_extra`, for the server to report.
    """

    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class AnswerModel(BaseModel):
    """An answer or a part of one, as the OpenAPI description shows it."""

    model_config = ConfigDict(protected_namespaces=())


def _read_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list):
        raise PydanticCustomError("stop_type", "must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError(
            "too_long", "must hold at most {most} strings", {"most": MAX_STOPS}
        )
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise PydanticCustomError(
                "stop_type", "must hold strings only, none of them empty"
            )
        if len(stop) > MAX_STOP_LENGTH:
            raise PydanticCustomError(
                "string_too_long",
                "must hold strings of at most {most} characters",
                {"most": MAX_STOP_LENGTH},
            )
    return stops


def _read_logit_bias(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "must map token ids to numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError(
            "too_long", "must hold at most {most} ids", {"most": MAX_LOGIT_BIAS}
        )
    for key, number in value.items():
        if not key.isdecimal() or len(key) > 10:
            raise PydanticCustomError("bias_key", "must have token ids as keys")
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not is_number or not -100 <= number <= 100:
            raise PydanticCustomError(
                "bias_value", "must hold numbers between -100 and 100"
            )
    return value


STOP_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
        {
            "type": "array",
            "maxItems": MAX_STOPS,
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
        },
        {"type": "null"},
    ]
}
BIAS_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "maxProperties": MAX_LOGIT_BIAS,
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        {"type": "null"},
    ]
}

Temperature = Annotated[float, Field(ge=0, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Field(ge=0, le=INT32_MAX)]
PositiveCount = Annotated[int, Field(ge=1, le=INT32_MAX)]
CountOrAll = Annotated[int, Field(ge=-1, le=INT32_MAX)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
Name = Annotated[str, Field(max_length=4096)]
Stop = Annotated[
    list[str] | None, BeforeValidator(_read_stop), WithJsonSchema(STOP_SCHEMA)
]
LogitBias = Annotated[
    dict[str, float] | None,
    BeforeValidator(_read_logit_bias),
    WithJsonSchema(BIAS_SCHEMA),
]


class StreamOptions(RequestModel):
    """What a stream holds besides the output.

    Attributes:
        include_usage: One more chunk, before the end, with the counts of tokens.
        continuous_usage_stats: Counts of tokens in every chunk.
        include_obfuscation: Accepted as False only: chunks are not padded.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(RequestModel):
    """How tokens are chosen, in the words of OpenAI and of vLLM."""

    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: CountOrAll | None = None
    min_p: Share | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = None
    seed: Seed | None = None
    stop: Stop = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    bad_words: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
            Field(max_length=128),
        ]
        | None
    ) = None
    logit_bias: LogitBias = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    thinking_token_budget: CountOrAll | None = None


class CommonFields(SamplingFields):
    """What completions and chat completions share besides sampling."""

    model: Name | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: PositiveCount | None = None
    user: Name | None = None
    metadata: dict[str, Any] | None = None
    prompt_logprobs: CountOrAll | None = None
    logprob_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    truncate_prompt_tokens: CountOrAll | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=INT32_MAX)] | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class PromptTokensDetails(AnswerModel):
    """Where prompt tokens came from."""

    cached_tokens: int = 0


class CompletionTokensDetails(AnswerModel):
    """What the generated tokens were used for."""

    reasoning_tokens: int = 0


class Usage(AnswerModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


class ErrorObject(AnswerModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(AnswerModel):
    """The body of every answer that is an error."""

    error: ErrorObject
