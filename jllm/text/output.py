"""Token outputs of the engine to the outputs that users get."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from jllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jllm.text.activations import join_activations
from jllm.text.detokenizer import Detokenizer, StopStrings
from jllm.text.prompts import PreparedRequest
from jllm.text.tokenizer import Tokenizer
from jllm.types import (
    EngineRequest,
    FinishReason,
    RequestOutputKind,
    TokenLogprobs,
    TokenOutput,
)


class RequestStream:
    """Collects one request's tokens, and gives its outputs of the kind asked for.

    Whatever arrives between two calls of `take` is in one output, so that a slow reader
    makes outputs larger, not more.
    """

    def __init__(
        self,
        prepared: PreparedRequest,
        tokenizer: Tokenizer | None,
        kind: RequestOutputKind | None = None,
        interval: int = 1,
    ) -> None:
        """Begins with no tokens.

        Args:
            prepared: The request.
            tokenizer: None leaves the text empty.
            kind: Replaces the one in the sampling parameters.
            interval: Tokens that one output waits for, except the first and the last.
        """
        request = prepared.request
        self._request = request
        self._prompt = prepared.prompt
        # One list for all outputs: their cost must not grow with the prompt.
        self._prompt_token_ids = list(request.prompt_token_ids)
        self._tokenizer = tokenizer
        self._kind = request.params.output_kind if kind is None else kind
        self._sequences = [
            _Sequence(i, request, tokenizer) for i in range(request.params.n)
        ]
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._cached_tokens: int | None = None
        self._metrics = RequestMetrics(arrival_time=time.monotonic())
        self._error: str | None = None
        self._finished = False
        self._has_news = False
        self._interval = interval
        self._num_new = 0
        # The first token does not wait, nor does the end of a sequence.
        self._is_due = True

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self._request.request_id

    @property
    def finished(self) -> bool:
        """Whether all sequences have ended."""
        return self._finished

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far, of all sequences."""
        return sum(len(sequence.token_ids) for sequence in self._sequences)

    @property
    def error(self) -> str | None:
        """What went wrong, with finish reason "error"."""
        return self._error

    @property
    def has_output(self) -> bool:
        """Whether `take` would give anything."""
        if not self._has_news or self._finished:
            return self._has_news
        if self._kind is RequestOutputKind.FINAL_ONLY:
            return False
        if self._is_due or self._interval == 1:
            return True
        return self._num_new >= self._interval * len(self._sequences)

    def push_token(self, index: int, token_id: int) -> bool:
        """Takes a token of a sequence that brought nothing else; returns as `push`."""
        sequence = self._sequences[index]
        if sequence.finish_reason:
            return False
        self._has_news = True
        self._num_new += 1
        if not sequence.push_token(token_id):
            return False
        self._note_end()
        return True

    def push(self, output: TokenOutput) -> bool:
        """Takes new tokens.

        Returns:
            Whether a stop string has ended the sequence; the engine, which knows tokens
            only, has to be told.
        """
        sequence = self._sequences[output.index]
        if sequence.finish_reason:
            return False
        if self._metrics.first_token_time is None and output.token_ids:
            self._metrics.first_token_time = time.monotonic()
            self._metrics.scheduled_time = output.scheduled_time
        self._cached_tokens = output.num_cached_tokens
        self._error = output.error or self._error
        if output.prompt_logprobs is not None:
            self._set_prompt_logprobs(output.prompt_logprobs)
        sequence.push(output)
        self._has_news = True
        self._num_new += len(output.token_ids)
        if sequence.finish_reason:
            self._note_end()
        return sequence.finish_reason is not None and output.finish_reason is None

    def abort(self) -> None:
        """Ends the sequences that still run, with finish reason "abort"."""
        for sequence in self._sequences:
            if not sequence.finish_reason:
                sequence.finish("abort")
        if not self._finished:
            self._has_news = True
            self._note_end()

    def take(self) -> RequestOutput | None:
        """Gives what is new, or None while there is nothing to give."""
        if not self.has_output:
            return None
        self._has_news = self._is_due = False
        self._num_new = 0
        if self._kind is RequestOutputKind.DELTA:
            outputs = [s.delta() for s in self._sequences if s.has_news]
        else:
            outputs = [s.whole() for s in self._sequences]
        output = RequestOutput(
            request_id=self._request.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=self._prompt_logprobs,
            outputs=outputs,
            finished=self._finished,
            metrics=self._metrics,
            num_cached_tokens=self._cached_tokens,
        )
        if self._kind is RequestOutputKind.DELTA:
            self._prompt_logprobs = None
        return output

    def _note_end(self) -> None:
        """Notes that a sequence has ended."""
        self._is_due = True
        if all(sequence.finish_reason for sequence in self._sequences):
            self._finished = True
            self._metrics.finished_time = time.monotonic()

    def _set_prompt_logprobs(self, entries: Sequence[TokenLogprobs]) -> None:
        """The first token of a prompt has no probability."""
        known = [_logprob_dict(entry, self._tokenizer) for entry in entries]
        self._prompt_logprobs = [None, *known]


class _Sequence:
    """Tokens and text of one of the `n` sequences."""

    def __init__(
        self,
        index: int,
        request: EngineRequest,
        tokenizer: Tokenizer | None,
    ) -> None:
        params = request.params
        self._index = index
        self._params = params
        self._prompt_token_ids = request.prompt_token_ids
        self._captures = request.probes is not None and bool(request.probes.capture)
        self._activations: list[Mapping[str, Any]] = []
        self._tokenizer = tokenizer
        self._detokenizer = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(
                tokenizer,
                request.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        self._stops = StopStrings(
            params.stop or (), include_in_output=params.include_stop_str_in_output
        )
        self._has_logprobs = params.logprobs is not None or bool(
            params.logprob_token_ids
        )
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative = 0.0
        self._text = ""
        self._num_given = 0
        self._length_given = 0
        self._end_given = False
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    @property
    def has_news(self) -> bool:
        """Whether `delta` would tell anything."""
        has_tokens = len(self.token_ids) > self._num_given
        return has_tokens or (self.finish_reason is not None and not self._end_given)

    def push(self, output: TokenOutput) -> None:
        """Takes new tokens, up to the one that completes a stop string."""
        self._activations += output.activations
        last = len(output.token_ids) - 1
        for i, token_id in enumerate(output.token_ids):
            if output.logprobs is not None:
                self._push_logprobs(output.logprobs[i])
            ends = i == last and output.finish_reason == "stop"
            is_stop_token = ends and not output.is_complete
            if is_stop_token and not self._params.include_stop_str_in_output:
                self.token_ids.append(token_id)
            elif self.push_token(token_id):
                return
        if output.finish_reason is not None:
            self.stop_reason = output.stop_reason
            self.finish(output.finish_reason)

    def push_token(self, token_id: int) -> bool:
        """Takes a token; returns whether it completes a stop string, which ends it."""
        self.token_ids.append(token_id)
        if self._detokenizer is None:
            return False
        text, stop = self._find_stop(self._detokenizer.push(token_id))
        self._text += text
        if stop is None:
            return False
        self.finish_reason, self.stop_reason = "stop", stop
        return True

    def finish(self, reason: FinishReason) -> None:
        """Ends the sequence and its text; what was held back may hold a stop string."""
        self.finish_reason = reason
        if self._detokenizer is None:
            return
        text, stop = self._find_stop(self._detokenizer.flush())
        self._text += text
        if stop is None:
            self._text += self._stops.flush()
        else:
            self.finish_reason, self.stop_reason = "stop", stop

    def whole(self) -> CompletionOutput:
        """All that is known so far."""
        return self._completion(0, 0)

    def delta(self) -> CompletionOutput:
        """What was not given before."""
        completion = self._completion(self._num_given, self._length_given)
        self._num_given = len(self.token_ids)
        self._length_given = len(self._text)
        self._end_given = self.finish_reason is not None
        return completion

    def _find_stop(self, text: str) -> tuple[str, str | None]:
        """Within the first `min_tokens` tokens a stop string does not count."""
        if len(self.token_ids) <= self._params.min_tokens:
            return text, None
        return self._stops.push(text)

    def _push_logprobs(self, entry: TokenLogprobs) -> None:
        self._cumulative += entry.logprob
        ranked = not self._params.logprob_token_ids
        self._logprobs.append(_logprob_dict(entry, self._tokenizer, ranked=ranked))

    def _completion(self, first_token: int, first_character: int) -> CompletionOutput:
        return CompletionOutput(
            index=self._index,
            text=self._text[first_character:],
            token_ids=self.token_ids[first_token:],
            cumulative_logprob=self._cumulative if self._has_logprobs else None,
            logprobs=self._logprobs[first_token:] if self._has_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            activations=self._joined_activations(),
        )

    def _joined_activations(self) -> dict[str, Any] | None:
        """Of all tokens but the last, which was sampled; None before the end."""
        if not self._captures or self.finish_reason is None:
            return None
        num_sampled = max(len(self.token_ids), 1)
        length = len(self._prompt_token_ids) + num_sampled - 1
        return join_activations(self._activations, length)


def _logprob_dict(
    entry: TokenLogprobs, tokenizer: Tokenizer | None, *, ranked: bool = True
) -> dict[int, Logprob]:
    """The token itself first, then the best ones, or those asked for by id."""

    def text(token_id: int) -> str | None:
        return None if tokenizer is None else tokenizer.token_text(token_id)

    found = {entry.token_id: Logprob(entry.logprob, entry.rank, text(entry.token_id))}
    pairs = zip(entry.top_ids, entry.top_logprobs, strict=True)
    for i, (token_id, logprob) in enumerate(pairs):
        rank = i + 1 if ranked else None
        found.setdefault(token_id, Logprob(logprob, rank, text(token_id)))
    return found
