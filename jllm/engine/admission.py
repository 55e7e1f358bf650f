"""From a request to the sequences that are scheduled; refuses what cannot be run."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jllm.checks import integer
from jllm.engine.pooling import PooledPrompt
from jllm.engine.probes import ProbedJob, make_probed, resolve
from jllm.errors import ContextTooLongError, InvalidRequestError
from jllm.pooling import PoolingParams
from jllm.processors import check_arguments
from jllm.sampling.grammar import Matcher
from jllm.sampling.rules import RowRules, RuleLayout, pack_rules
from jllm.sampling.thinking import ThinkingMatcher
from jllm.scheduler.request import Request
from jllm.types import EngineRequest, SamplingParams, TokenLogprobs


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that every request has to respect.

    Attributes:
        vocab_size: Token ids.
        max_model_len: Most tokens of prompt and output.
        max_logprobs: Most log-probabilities per token.
        eos_token_ids: Tokens that end the output of this model.
        width: Length of its hidden states.
        activations: Names of what can be captured and edited; none if nothing can.
        extra_args: Arguments of the logits processors, with their defaults.
        has_processors: Whether there are any, so that all tokens are theirs.
    """

    vocab_size: int
    max_model_len: int
    max_logprobs: int
    eos_token_ids: tuple[int, ...]
    width: int
    activations: tuple[str, ...] = ()
    extra_args: Mapping[str, np.ndarray] = dataclasses.field(
        default_factory=dict[str, np.ndarray]
    )
    has_processors: bool = False


@dataclasses.dataclass(slots=True)
class Job:
    """What the engine remembers of one sequence, beside the scheduler's `Request`.

    Attributes:
        request: The request that it belongs to.
        end: Length at which it is full.
        seed: Its random stream.
        stop_token_ids: All tokens that end it, those the user named first.
        rules: Packed sampling rules, None when it needs no sampler program.
        prompt_logprobs: Collected entries by position, from position 1.
        first_scored: Position of the first token whose successor is scored for them.
        matcher: Its place in the grammar that its output follows, None without one.
        failure: Why that grammar cannot go on.
        scheduled_time: When its first step was launched, on the monotonic clock.
        pooled: Sums of its hidden states, where it is pooled and generates nothing.
        probed: What is captured and edited of its activations, None for nothing.
        extra_args: Its arguments of the logits processors, in their order.
    """

    request: EngineRequest
    end: int
    seed: int
    stop_token_ids: tuple[int, ...]
    rules: np.ndarray | None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    first_scored: int = 0
    matcher: Matcher | ThinkingMatcher | None = None
    failure: str | None = None
    scheduled_time: float | None = None
    pooled: PooledPrompt | None = None
    probed: ProbedJob | None = None
    extra_args: tuple[np.ndarray, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether its grammar allows nothing more."""
        return self.matcher is not None and self.matcher.is_complete


def validate(request: EngineRequest, limits: Limits) -> None:
    """Refuses a request before anything is queued.

    Raises:
        ContextTooLongError: The prompt leaves no room for a token.
        InvalidRequestError: Another field is wrong; names field, value and bound.
    """
    prompt, params = request.prompt_token_ids, request.params
    if not prompt:
        raise InvalidRequestError("the prompt is empty", parameter="prompt")
    _check_ids("prompt_token_ids", prompt, limits.vocab_size)
    if request.pooling is not None:
        _check_pooled(len(prompt), request.pooling, limits)
        return
    if len(prompt) >= limits.max_model_len:
        raise ContextTooLongError(
            # Clients know the error by OpenAI's words for it, which come first.
            f"this model's maximum context length is {limits.max_model_len} tokens "
            f"(max_model_len), and the prompt has {len(prompt)}; at least one token "
            "must be left for the output",
            parameter="prompt",
        )
    for field in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        _check_ids(field, getattr(params, field) or (), limits.vocab_size)
    _check_ids("logit_bias", params.logit_bias or (), limits.vocab_size)
    for word in request.bad_words_token_ids:
        _check_ids("bad_words", word, limits.vocab_size)
    if params.structured_outputs is not None and request.grammar is None:
        raise InvalidRequestError(
            "structured_outputs must have been compiled to a grammar",
            parameter="structured_outputs",
        )
    if request.probes is not None:
        resolve(request.probes, limits.activations)
    check_arguments(params.extra_args, limits.extra_args)
    _check_logprobs(request, limits)


def _check_logprobs(request: EngineRequest, limits: Limits) -> None:
    prompt, params = request.prompt_token_ids, request.params
    start, last = request.prompt_logprobs_start, len(prompt) - 1
    if start != 1:
        integer("prompt_logprobs_start", start, 1, last)
    for field in ("logprobs", "prompt_logprobs"):
        count = getattr(params, field)
        asked = limits.vocab_size if count == -1 else count
        if asked is not None and asked > limits.max_logprobs:
            raise InvalidRequestError(
                f"{field}={count} must be at most max_logprobs={limits.max_logprobs}",
                parameter=field,
            )


def _check_pooled(length: int, pooling: PoolingParams, limits: Limits) -> None:
    if length > limits.max_model_len:
        raise ContextTooLongError(
            f"this model's maximum context length is {limits.max_model_len} tokens "
            f"(max_model_len), and the prompt has {length}",
            parameter="prompt",
        )
    if pooling.dimensions is not None and pooling.dimensions > limits.width:
        raise InvalidRequestError(
            f"dimensions={pooling.dimensions} must be at most {limits.width}, the "
            "width of the model",
            parameter="dimensions",
        )


def _check_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError(
                f"{field} holds {token!r}, which is no token id", parameter=field
            )
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(
                f"{field} holds {token}, which is out of vocabulary: ids are between "
                f"0 and {vocab_size - 1}",
                parameter=field,
            )


def make_sequences(
    request: EngineRequest,
    limits: Limits,
    rule_layout: RuleLayout,
    *,
    seed: int,
    first_id: int,
    arrival: int,
) -> list[Request]:
    """The `n` sequences of a valid request; all but the first are forks of it.

    Sequence `i` has the seed of the request plus `i`.
    """
    params, prompt = request.params, request.prompt_token_ids
    room = limits.max_model_len - len(prompt)
    max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    pooling, pooled = request.pooling, None
    if pooling is not None:
        max_tokens, pooled = 0, PooledPrompt(pooling, len(prompt))
    eos = () if params.ignore_eos else (*limits.eos_token_ids, *request.eos_token_ids)
    stop_ids = tuple(dict.fromkeys((*(params.stop_token_ids or ()), *eos)))
    rules = None
    if limits.has_processors or needs_sampler(request, stop_ids):
        rules = pack_rules(rule_layout, _row_rules(request, stop_ids))
    given = check_arguments(params.extra_args, limits.extra_args)
    extra_args = tuple(given.values())
    sequences: list[Request] = []
    for index in range(params.n):
        job = Job(
            request=request,
            end=len(prompt) + max_tokens,
            seed=(seed + index) % 2**64,
            stop_token_ids=stop_ids,
            rules=rules,
            matcher=_matcher(request, limits, rule_layout),
            pooled=pooled,
            extra_args=extra_args,
        )
        if request.probes is not None:
            job.probed = make_probed(request.probes, limits.activations)
        wants_prompt = params.prompt_logprobs is not None and index == 0
        if wants_prompt:
            nothing: list[TokenLogprobs | None] = [None]
            job.prompt_logprobs = nothing * (len(prompt) - 1)
            job.first_scored = request.prompt_logprobs_start - 1
        sequences.append(
            Request(
                sequence_id=first_id + index,
                request_id=request.request_id,
                index=index,
                prompt_token_ids=prompt,
                max_tokens=max_tokens,
                min_tokens=params.min_tokens,
                stop_token_ids=frozenset(stop_ids),
                priority=request.priority,
                arrival=arrival,
                cache_salt=request.cache_salt,
                # What an edit has changed is of no use to others.
                adapter=f"edited-{first_id}" if _is_edited(request) else None,
                max_cached_tokens=_max_cached(request, index),
                fork_of=sequences[0] if index and not _captures(request) else None,
                payload=job,
            )
        )
    return sequences


def _is_edited(request: EngineRequest) -> bool:
    return request.probes is not None and bool(request.probes.edit)


def _captures(request: EngineRequest) -> bool:
    """Whether every token has to be computed for each of its sequences."""
    return request.probes is not None and bool(request.probes.capture)


def _max_cached(request: EngineRequest, index: int) -> int | None:
    """Tokens whose hidden states a sequence does not need; None for all."""
    if _captures(request):
        return 0
    if index:
        return None
    if request.pooling is not None and not request.pooling.reads_prefix_cache():
        return 0
    if request.params.prompt_logprobs is None:
        return None
    return request.prompt_logprobs_start - 1


def _matcher(
    request: EngineRequest, limits: Limits, rule_layout: RuleLayout
) -> Matcher | ThinkingMatcher | None:
    params, vocab_size = request.params, rule_layout.vocab_size
    end_ids = (*limits.eos_token_ids, *request.eos_token_ids)
    grammar = None
    if request.grammar is not None:
        grammar = Matcher(
            request.grammar,
            vocab_size,
            end_ids=end_ids,
            may_end=not params.ignore_eos,
            allowed_ids=params.allowed_token_ids,
        )
    if request.thinking is None:
        return grammar
    return ThinkingMatcher(request.thinking, vocab_size, grammar, end_ids)


def needs_sampler(request: EngineRequest, stop_ids: Sequence[int]) -> bool:
    """Whether its tokens need more than argmax or a plain temperature."""
    params = request.params
    return (
        _has_filters(params)
        or request.grammar is not None
        or request.thinking is not None
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or params.repetition_penalty != 1
        or params.logprobs is not None
        or bool(params.logprob_token_ids)
        or bool(params.logit_bias)
        or params.allowed_token_ids is not None
        or bool(request.bad_words_token_ids)
        or (params.min_tokens > 0 and bool(stop_ids))
    )


def _has_filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _row_rules(request: EngineRequest, stop_ids: tuple[int, ...]) -> RowRules:
    params = request.params
    allowed = params.allowed_token_ids
    return RowRules(
        logit_bias=dict(params.logit_bias or {}),
        allowed_token_ids=None if allowed is None else tuple(allowed),
        stop_token_ids=stop_ids if params.min_tokens else (),
        bad_words_token_ids=request.bad_words_token_ids,
        logprob_token_ids=tuple(params.logprob_token_ids or ()),
    )
