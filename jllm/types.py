"""Values that cross layers: sampling parameters and request outputs.

Axis letters used in annotations: `T` tokens in a step, `S` rows in a step, `R` rows of
the table, `E` model width, `H` query heads, `K` KV heads, `D` head width, `F` MLP
width, `V` vocabulary, `L` layers, `B` blocks in the pool, `P` places per block, `M`
blocks per row at most, `N` any count.
"""

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from jllm.errors import InvalidRequestError
from jllm.structured_outputs import StructuredOutputsParams, make_structured_outputs

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_N = 16384
MAX_STOP_TOKEN_IDS = 128
MAX_BAD_WORDS = 128
MAX_LOGIT_BIAS = 1024
MAX_LOGPROB_TOKEN_IDS = 128
GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy."""
MIN_TEMPERATURE = 1e-2
"""Temperatures between greedy and this are raised to it, or float32 would overflow."""


class RequestOutputKind(enum.Enum):
    """What each `RequestOutput` of a stream holds."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


def _fail(field: str, value: object, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}={value!r} {rule}", parameter=field)


def _number(field: str, value: Any, low: float, high: float, rule: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _fail(field, value, "must be a number")
    if not (math.isfinite(value) and low <= value <= high):
        raise _fail(field, value, rule)
    return float(value)


def _integer(field: str, value: Any, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _fail(field, value, "must be an integer")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise _fail(field, value, f"must be {bound}")
    return value


def _boolean(field: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _fail(field, value, "must be true or false")


def _ids(field: str, value: Any, limit: int | None = None) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise _fail(field, value, "must be a list of token ids")
    tokens = cast(Sequence[Any], value)
    ids = tuple(dict.fromkeys(_integer(field, token, 0) for token in tokens))
    if limit is not None and len(ids) > limit:
        raise _fail(field, f"<{len(ids)} ids>", f"must hold at most {limit} ids")
    return ids


def _strings(field: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise _fail(field, value, "must be a string or a list of strings")
    values = (value,) if isinstance(value, str) else cast(Sequence[Any], value)
    for text in values:
        if not isinstance(text, str):
            raise _fail(field, value, "must hold strings only")
        if not text:
            raise _fail(field, value, "must not hold an empty string")
    return tuple(values)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen; names, defaults and ranges as in vLLM.

    Attributes:
        n: Sequences generated from the prompt.
        presence_penalty: Subtracted once from each token already generated, [-2, 2].
        frequency_penalty: Subtracted per occurrence in the output, [-2, 2].
        repetition_penalty: Divides positive and multiplies negative scores of tokens in
            prompt and output, above 0.
        temperature: Divides the scores, [0, 2]; below 1e-5 the best token is taken.
        top_p: Smallest set of best tokens with at least this probability, (0, 1].
        top_k: Number of best tokens kept; 0 or -1 keeps all.
        min_p: Tokens below this share of the best probability are dropped, [0, 1].
        seed: Makes sampling reproducible whatever else is in the batch.
        stop: Strings that end the output.
        stop_token_ids: Tokens that end the output, besides the model's own.
        bad_words: Strings that must not be generated.
        ignore_eos: Goes on after the end-of-sequence token.
        max_tokens: Most tokens generated; None is up to the context length.
        min_tokens: No stop token before this many tokens.
        logprobs: Number of best log-probabilities returned per token; -1 is all.
        prompt_logprobs: The same for the tokens of the prompt.
        logprob_token_ids: Ids whose log-probability is returned per token.
        logit_bias: Added to the scores of these ids, clamped to [-100, 100].
        allowed_token_ids: Only these ids may be generated.
        detokenize: Produces text; False leaves it empty.
        skip_special_tokens: Leaves special tokens out of the text.
        spaces_between_special_tokens: Puts spaces between them when they are kept.
        include_stop_str_in_output: Keeps the stop string at the end of the text.
        truncate_prompt_tokens: Keeps only the last tokens of the prompt; -1 is as many
            as the context holds.
        output_kind: What each output of a stream holds.
        structured_outputs: The form that the output must have, or a mapping with the
            fields of `StructuredOutputsParams`.
        reasoning_parser: Name of the form of the model's reasoning, behind which
            `structured_outputs` begin; None where the output has none.
        thinking_token_budget: Most tokens of reasoning; None or -1 is any number.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    reasoning_parser: str | None = None
    thinking_token_budget: int | None = None

    def __post_init__(self) -> None:
        """Checks every range and normalises; see `InvalidRequestError`."""
        self._check_numbers()
        self._check_lists()
        for field in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):
            _boolean(field, getattr(self, field))
        if self.output_kind not in tuple(RequestOutputKind):
            raise _fail("output_kind", self.output_kind, "must be a RequestOutputKind")
        structured = make_structured_outputs(self.structured_outputs)
        self._set(structured_outputs=structured)
        if self.thinking_token_budget is not None:
            _integer("thinking_token_budget", self.thinking_token_budget, -1)
        if self.stop and not self.detokenize:
            raise _fail("stop", self.stop, "needs detokenize=True")
        if self.is_greedy:
            if self.n > 1:
                raise _fail("n", self.n, "must be 1 with temperature=0 (greedy)")
            self._set(top_p=1.0, top_k=0, min_p=0.0)
        elif self.temperature < MIN_TEMPERATURE:
            self._set(temperature=MIN_TEMPERATURE)

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        for field in ("presence_penalty", "frequency_penalty"):
            rule = "must be between -2 and 2"
            self._set(**{field: _number(field, getattr(self, field), -2, 2, rule)})
        repetition = _number(
            "repetition_penalty",
            self.repetition_penalty,
            0,
            math.inf,
            "must be finite and above 0",
        )
        if repetition <= 0:
            raise _fail("repetition_penalty", repetition, "must be finite and above 0")
        temperature = _number(
            "temperature", self.temperature, 0, 2, "must be between 0 and 2"
        )
        top_p = _number("top_p", self.top_p, 0, 1, "must be above 0 and at most 1")
        if top_p <= 0:
            raise _fail("top_p", top_p, "must be above 0 and at most 1")
        min_p = _number("min_p", self.min_p, 0, 1, "must be between 0 and 1")
        top_k = _integer("top_k", self.top_k, -1)
        seed = self.seed
        if seed is not None:
            seed = _integer("seed", seed, -(2**63), 2**64 - 1)
            seed = None if seed == -1 else seed
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                _integer(field, getattr(self, field), -1)
        if self.truncate_prompt_tokens is not None:
            _integer("truncate_prompt_tokens", self.truncate_prompt_tokens, -1)
            if self.truncate_prompt_tokens == 0:
                raise _fail("truncate_prompt_tokens", 0, "must be -1 or at least 1")
        self._set(
            repetition_penalty=repetition,
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            top_k=max(top_k, 0),
            seed=seed,
        )

    def _check_lists(self) -> None:
        self._set(
            stop=_strings("stop", () if self.stop is None else self.stop),
            stop_token_ids=_ids(
                "stop_token_ids", self.stop_token_ids or (), MAX_STOP_TOKEN_IDS
            ),
        )
        words = () if self.bad_words is None else self.bad_words
        self._set(bad_words=_strings("bad_words", words))
        if len(words) > MAX_BAD_WORDS:
            rule = f"must hold at most {MAX_BAD_WORDS} strings"
            raise _fail("bad_words", f"<{len(words)} strings>", rule)
        if self.allowed_token_ids is not None:
            allowed = _ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise _fail("allowed_token_ids", [], "must not be empty")
            self._set(allowed_token_ids=allowed)
        if self.logprob_token_ids is not None:
            ids = _ids(
                "logprob_token_ids", self.logprob_token_ids, MAX_LOGPROB_TOKEN_IDS
            )
            if self.logprobs is not None and self.logprobs != len(ids):
                rule = f"must equal the {len(ids)} logprob_token_ids when both are set"
                raise _fail("logprobs", self.logprobs, rule)
            self._set(logprob_token_ids=ids)
        if self.logit_bias is not None:
            self._set(logit_bias=self._checked_bias(self.logit_bias))

    @staticmethod
    def _checked_bias(value: Any) -> dict[int, float]:
        if not isinstance(value, Mapping):
            raise _fail("logit_bias", value, "must map token ids to numbers")
        bias = cast(Mapping[Any, Any], value)
        if len(bias) > MAX_LOGIT_BIAS:
            rule = f"must hold at most {MAX_LOGIT_BIAS} ids"
            raise _fail("logit_bias", f"<{len(bias)} ids>", rule)
        checked: dict[int, float] = {}
        for key, value in bias.items():
            # JSON has only strings for keys.
            token = int(key) if isinstance(key, str) and key.isdecimal() else key
            token = _integer("logit_bias", token, 0)
            number = _number("logit_bias", value, -math.inf, math.inf, "must be finite")
            checked[token] = min(100.0, max(-100.0, number))
        return checked

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """One log-probability.

    Attributes:
        logprob: Natural logarithm, of the model's own distribution.
        rank: 1 for the most probable token of the vocabulary.
        decoded_token: Text of the token, None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one position, as the engine reports them.

    Attributes:
        token_id: The token at this position.
        logprob: Its log-probability.
        rank: Its rank, 1 is the most probable.
        top_ids: Most probable ids, best first.
        top_logprobs: Their log-probabilities.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclasses.dataclass(slots=True)
class TokenOutput:
    """What one step brought for one sequence of a request.

    Not frozen, which would make it three times as slow to make; there is one for every
    token.

    Attributes:
        request_id: Id given to `Engine.add`.
        index: Which of the `n` sequences.
        token_ids: New tokens; empty when the sequence ended without one.
        logprobs: One entry per new token when asked for.
        prompt_logprobs: Entries for all prompt positions but the first, sent once, with
            the first token of sequence 0.
        finish_reason: Set once, on the last output of the sequence.
        stop_reason: The stop token id that ended it, None for the model's own.
        num_cached_tokens: Prompt tokens found in the prefix cache.
        error: Sentence for finish reason "error".
        is_complete: Whether a grammar ended it, with a last token that is output.
        scheduled_time: When the first step of the sequence was launched, on the
            monotonic clock; at least with its first token.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    is_complete: bool = False
    scheduled_time: float | None = None


@dataclasses.dataclass(slots=True)
class CompletionOutput:
    """One generated sequence.

    Attributes:
        index: Which of the `n` sequences.
        text: Generated text.
        token_ids: Generated tokens.
        cumulative_logprob: Sum over the sampled tokens when logprobs were asked for.
        logprobs: Per token, id to `Logprob`.
        finish_reason: None while it runs.
        stop_reason: The stop string or stop token id that ended it.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether the sequence has ended."""
        return self.finish_reason is not None


@dataclasses.dataclass(slots=True)
class RequestMetrics:
    """Times of one request in seconds on the monotonic clock.

    Attributes:
        arrival_time: When it was added.
        scheduled_time: When the first step with its tokens was launched.
        first_token_time: When its first token reached the host.
        finished_time: When its last sequence ended.
    """

    arrival_time: float
    scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """What is known of a request so far, or in all when `finished`.

    Attributes:
        request_id: Id of the request.
        prompt: Its text, None for token prompts.
        prompt_token_ids: Its tokens.
        prompt_logprobs: Per prompt token, None for the first.
        outputs: One entry per sequence.
        finished: Whether all sequences have ended.
        metrics: Times.
        num_cached_tokens: Prompt tokens found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class EngineRequest:
    """A validated request in token space, as `Engine.add` takes it.

    Attributes:
        request_id: Unique among open requests.
        prompt_token_ids: At least one id, all within the vocabulary.
        params: How its tokens are chosen.
        eos_token_ids: Tokens that end the output besides the model's own; with
            `params.ignore_eos` neither these nor the model's own end it.
        bad_words_token_ids: Token sequences that must not be generated.
        priority: Smaller runs first; equal priorities run in order of arrival.
        cache_salt: Prompts share cached blocks only under the same salt.
        grammar: What `params.structured_outputs` was compiled to, a
            `jllm.sampling.grammar.Grammar`.
        thinking: What bounds its reasoning, a `jllm.sampling.thinking.Thinking`.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    cache_salt: str | None = None
    grammar: Any = None
    thinking: Any = None
