"""From the pooled hidden states of a prompt to its embedding."""

import dataclasses
import time
from typing import Literal

import numpy as np

from jllm.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestMetrics
from jllm.pooling import PoolingParams
from jllm.text.output import RequestStream
from jllm.text.prompts import PreparedRequest
from jllm.text.tokenizer import Tokenizer
from jllm.types import RequestOutputKind, TokenOutput


def make_embedding(pooled: np.ndarray, params: PoolingParams) -> np.ndarray:
    """Cuts and normalises a vector; float32 comes last.

    Args:
        pooled: f64[E] mean of the hidden states that count.
        params: What is asked for.

    Returns:
        f32[N], `N` being `params.dimensions` or the whole width.
    """
    kept = pooled[: params.dimensions]
    if params.normalize:
        length = float(np.linalg.norm(kept))
        kept = kept / (length or 1.0)
    return kept.astype(np.float32)


class EmbeddingStream:
    """Collects the one output of a pooled request, as `RequestStream` does others'."""

    def __init__(self, prepared: PreparedRequest, params: PoolingParams) -> None:
        """Begins without a result."""
        self._request = prepared.request
        self._params = params
        self._output: EmbeddingRequestOutput | None = None
        self._metrics = RequestMetrics(arrival_time=time.monotonic())
        self._error: str | None = None
        self._is_taken = False

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self._request.request_id

    @property
    def finished(self) -> bool:
        """Whether the request has ended."""
        return self._output is not None

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, once it is pooled."""
        return len(self._request.prompt_token_ids) if self.finished else 0

    @property
    def error(self) -> str | None:
        """What went wrong, with finish reason "error"."""
        return self._error

    @property
    def has_output(self) -> bool:
        """Whether `take` would give anything."""
        return self._output is not None and not self._is_taken

    def push_token(self, index: int, token_id: int) -> bool:
        """Takes no token: one that is drawn after a pooled prompt is nobody's."""
        del index, token_id
        return False

    def push(self, output: TokenOutput) -> bool:
        """Takes the result; returns False: there is nothing to stop."""
        if self.finished:
            return False
        now = time.monotonic()
        self._metrics = dataclasses.replace(
            self._metrics,
            scheduled_time=output.scheduled_time,
            first_token_time=now,
            finished_time=now,
        )
        self._error = output.error
        if output.pooled is None:
            self._end(_nothing("error"), output.num_cached_tokens)
        else:
            embedding = make_embedding(output.pooled, self._params)
            self._end(EmbeddingOutput(embedding), output.num_cached_tokens)
        return False

    def abort(self) -> None:
        """Ends the request without a result, with finish reason "abort"."""
        if not self.finished:
            self._end(_nothing("abort"), None)

    def take(self) -> EmbeddingRequestOutput | None:
        """Gives the result once; None while there is none."""
        if self._is_taken or self._output is None:
            return None
        self._is_taken = True
        return self._output

    def _end(self, output: EmbeddingOutput, num_cached_tokens: int | None) -> None:
        self._output = EmbeddingRequestOutput(
            request_id=self.request_id,
            prompt_token_ids=list(self._request.prompt_token_ids),
            outputs=output,
            num_cached_tokens=num_cached_tokens,
            metrics=self._metrics,
        )


Stream = RequestStream | EmbeddingStream


def make_stream(
    prepared: PreparedRequest,
    tokenizer: Tokenizer | None,
    kind: RequestOutputKind | None = None,
    interval: int = 1,
) -> Stream:
    """What collects the outputs of a request; see `RequestStream`."""
    pooling = prepared.request.pooling
    if pooling is None:
        return RequestStream(prepared, tokenizer, kind, interval)
    return EmbeddingStream(prepared, pooling)


def _nothing(reason: Literal["abort", "error"]) -> EmbeddingOutput:
    return EmbeddingOutput(np.zeros(0, np.float32), finish_reason=reason)
