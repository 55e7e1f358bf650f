"""What users get: generated sequences, embeddings and scores, in vLLM's words."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from jllm.types import FinishReason


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
        activations: What was asked for with `capture`, once it has ended: by name a
            numpy array `[tokens, …]` for the prompt and the generated tokens but the
            last, which was sampled and not computed. Attention weights are `[tokens,
            heads, tokens]`, zero after the token's own position. None where nothing was
            asked for.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    activations: dict[str, Any] | None = None

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
class EmbeddingOutput:
    """One embedding.

    Attributes:
        embedding: f32[N] numpy array; empty where there is none.
        finish_reason: "stop", or why there is no embedding: "abort", or "error" where
            the model's output was not finite.
    """

    embedding: Any
    finish_reason: Literal["stop", "abort", "error"] = "stop"

    @property
    def hidden_size(self) -> int:
        """Its length `N`."""
        return len(self.embedding)


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """The embedding of one prompt.

    Attributes:
        request_id: Id of the request.
        prompt_token_ids: Tokens of the prompt.
        outputs: The embedding.
        finished: Always true: there is one output per request.
        num_cached_tokens: Prompt tokens found in the prefix cache.
        metrics: Times.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True
    num_cached_tokens: int | None = None
    metrics: RequestMetrics | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ScoreOutput:
    """How probable a continuation of a prompt is.

    Attributes:
        prompt_token_ids: Tokens before the continuation.
        token_ids: Tokens of the continuation.
        logprobs: Log-probability of each, given the prompt and those before it.
        is_greedy: Whether each is the most probable token at its place, so that
            greedy decoding would give the continuation.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    is_greedy: bool

    @property
    def score(self) -> float:
        """Sum of the log-probabilities."""
        return sum(self.logprobs)


@dataclasses.dataclass(frozen=True, slots=True)
class ScoreRequestOutput:
    """The scores of the continuations of one prompt.

    Attributes:
        outputs: One entry per continuation, in their order.
    """

    outputs: list[ScoreOutput]
