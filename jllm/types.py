"""Values that cross layers: sampling parameters and request outputs.

Axis letters used in annotations: `T` tokens in a step, `S` rows in a step, `R` rows of
the table, `E` model width, `H` query heads, `K` KV heads, `D` head width, `F` MLP
width, `V` vocabulary, `L` layers, `B` blocks in the pool, `P` places per block, `M`
blocks per row at most, `N` any count.
"""

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

from jllm.checks import boolean, id_list, integer, number, string_list, wrong
from jllm.pooling import PoolingParams
from jllm.probes import Probes
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
        extra_args: Arguments of the engine's logits processors by name: arrays, or what
            numpy makes arrays of, with the shapes and types of their defaults.
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
    extra_args: Mapping[str, Any] | None = None

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
            boolean(field, getattr(self, field))
        if self.output_kind not in tuple(RequestOutputKind):
            raise wrong("output_kind", self.output_kind, "must be a RequestOutputKind")
        structured = make_structured_outputs(self.structured_outputs)
        self._set(structured_outputs=structured)
        if self.thinking_token_budget is not None:
            integer("thinking_token_budget", self.thinking_token_budget, -1)
        if self.extra_args is not None and not isinstance(self.extra_args, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise wrong("extra_args", self.extra_args, "must map names to arrays")
        if self.stop and not self.detokenize:
            raise wrong("stop", self.stop, "needs detokenize=True")
        if self.is_greedy:
            if self.n > 1:
                raise wrong("n", self.n, "must be 1 with temperature=0 (greedy)")
            self._set(top_p=1.0, top_k=0, min_p=0.0)
        elif self.temperature < MIN_TEMPERATURE:
            self._set(temperature=MIN_TEMPERATURE)

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        integer("n", self.n, 1, MAX_N)
        for field in ("presence_penalty", "frequency_penalty"):
            rule = "must be between -2 and 2"
            self._set(**{field: number(field, getattr(self, field), -2, 2, rule)})
        repetition = number(
            "repetition_penalty",
            self.repetition_penalty,
            0,
            math.inf,
            "must be finite and above 0",
        )
        if repetition <= 0:
            raise wrong("repetition_penalty", repetition, "must be finite and above 0")
        temperature = number(
            "temperature", self.temperature, 0, 2, "must be between 0 and 2"
        )
        top_p = number("top_p", self.top_p, 0, 1, "must be above 0 and at most 1")
        if top_p <= 0:
            raise wrong("top_p", top_p, "must be above 0 and at most 1")
        min_p = number("min_p", self.min_p, 0, 1, "must be between 0 and 1")
        top_k = integer("top_k", self.top_k, -1)
        seed = self.seed
        if seed is not None:
            seed = integer("seed", seed, -(2**63), 2**64 - 1)
            seed = None if seed == -1 else seed
        if self.max_tokens is not None:
            integer("max_tokens", self.max_tokens, 1)
        integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                integer(field, getattr(self, field), -1)
        if self.truncate_prompt_tokens is not None:
            integer("truncate_prompt_tokens", self.truncate_prompt_tokens, -1)
            if self.truncate_prompt_tokens == 0:
                raise wrong("truncate_prompt_tokens", 0, "must be -1 or at least 1")
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
            stop=string_list("stop", () if self.stop is None else self.stop),
            stop_token_ids=id_list(
                "stop_token_ids", self.stop_token_ids or (), MAX_STOP_TOKEN_IDS
            ),
        )
        words = () if self.bad_words is None else self.bad_words
        self._set(bad_words=string_list("bad_words", words))
        if len(words) > MAX_BAD_WORDS:
            rule = f"must hold at most {MAX_BAD_WORDS} strings"
            raise wrong("bad_words", f"<{len(words)} strings>", rule)
        if self.allowed_token_ids is not None:
            allowed = id_list("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise wrong("allowed_token_ids", [], "must not be empty")
            self._set(allowed_token_ids=allowed)
        if self.logprob_token_ids is not None:
            ids = id_list(
                "logprob_token_ids", self.logprob_token_ids, MAX_LOGPROB_TOKEN_IDS
            )
            if self.logprobs is not None and self.logprobs != len(ids):
                rule = f"must equal the {len(ids)} logprob_token_ids when both are set"
                raise wrong("logprobs", self.logprobs, rule)
            self._set(logprob_token_ids=ids)
        if self.logit_bias is not None:
            self._set(logit_bias=self._checked_bias(self.logit_bias))

    @staticmethod
    def _checked_bias(value: Any) -> dict[int, float]:
        if not isinstance(value, Mapping):
            raise wrong("logit_bias", value, "must map token ids to numbers")
        bias = cast(Mapping[Any, Any], value)
        if len(bias) > MAX_LOGIT_BIAS:
            rule = f"must hold at most {MAX_LOGIT_BIAS} ids"
            raise wrong("logit_bias", f"<{len(bias)} ids>", rule)
        checked: dict[int, float] = {}
        for key, value in bias.items():
            # JSON has only strings for keys.
            token = int(key) if isinstance(key, str) and key.isdecimal() else key
            token = integer("logit_bias", token, 0)
            bias_of = number("logit_bias", value, -math.inf, math.inf, "must be finite")
            checked[token] = min(100.0, max(-100.0, bias_of))
        return checked

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE


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


@dataclasses.dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step brought for one sequence of a request.

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
        pooled: What the hidden states of a pooled prompt were reduced to, a numpy array
            f64[E], in its only output.
        activations: What has been captured since the last output: mappings from name
            to numpy array `[tokens, …]`, of consecutive tokens each.
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
    pooled: Any = None
    activations: Sequence[Mapping[str, Any]] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class StepOutputs:
    """What one step brought for all sequences.

    Most have a token and nothing else to tell; nothing is made for each of these.

    Attributes:
        keys: Request id and index of the sequences with just a token.
        token_ids: Their tokens.
        others: The outputs of the others: with a first token, or an end, or
            log-probabilities.
    """

    keys: Sequence[tuple[str, int]] = ()
    token_ids: Sequence[int] = ()
    others: Sequence[TokenOutput] = ()

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.keys) + len(self.others)

    def __iter__(self) -> Iterator[TokenOutput]:
        """Goes through all one by one."""
        for key, token_id in zip(self.keys, self.token_ids, strict=True):
            yield TokenOutput(*key, (token_id,))
        yield from self.others


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
        pooling: How the prompt's hidden states become one vector; such a request
            generates nothing.
        prompt_logprobs_start: First position of the prompt with prompt logprobs; what
            lies before may come from the prefix cache.
        probes: What is captured and edited of its activations.
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
    pooling: PoolingParams | None = None
    prompt_logprobs_start: int = 1
    probes: Probes | None = None
