"""Outputs of /v1/completions, whole and in chunks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jllm import CompletionOutput
from server.answer import to_json
from server.generation import Piece
from server.logprobs import CompletionLogprobs, TokenNames, prompt_logprobs


@dataclasses.dataclass(frozen=True, slots=True)
class CompletionOptions:
    """What the answer has to hold.

    Attributes:
        names: How tokens are written.
        echo: Puts the prompt in front of the text.
        wants_logprobs: Scores of the tokens.
        wants_prompt_logprobs: Scores of the prompt in vLLM's form.
        wants_token_ids: Token ids beside the text.
        scores_only: Generates nothing: `max_tokens` is 0.
    """

    names: TokenNames
    echo: bool
    wants_logprobs: bool
    wants_prompt_logprobs: bool
    wants_token_ids: bool
    scores_only: bool


class CompletionChoice:
    """One output: collects pieces, gives choices."""

    def __init__(
        self,
        index: int,
        options: CompletionOptions,
        prompt_text: str,
        prompt_token_ids: Sequence[int],
    ) -> None:
        """Begins with the prompt, if it is wanted."""
        self._index = index
        self._options = options
        self._prompt_text = prompt_text
        self._prompt_token_ids = prompt_token_ids
        self._logprobs = CompletionLogprobs(options.names)
        self._has_begun = False
        self.num_tokens = 0

    def whole(self, piece: Piece) -> dict[str, Any]:
        """The choice of a finished output."""
        completion = piece.completion
        text = self._text(completion, piece)
        choice = self._choice(text, completion)
        choice["finish_reason"] = self._finish_reason(completion)
        if completion.stop_reason is not None:
            choice["stop_reason"] = completion.stop_reason
        if self._options.wants_prompt_logprobs:
            choice["prompt_logprobs"] = prompt_logprobs(
                piece.prompt_logprobs, self._options.names
            )
        if self._options.wants_token_ids:
            choice["prompt_token_ids"] = list(self._prompt_token_ids)
        return choice

    def chunks(self, piece: Piece) -> list[str]:
        """JSON of the choices that a piece makes: text, then the end."""
        completion, found = piece.completion, list[str]()
        text = self._text(completion, piece)
        has_more = self._options.wants_logprobs or self._options.wants_token_ids
        if has_more and (text or completion.token_ids):
            found.append(to_json(self._choice(text, completion)))
        elif text:
            # Most chunks of most streams; what is made of a dictionary is the same.
            found.append(
                f'{{"text":{to_json(text)},"index":{self._index},'
                '"logprobs":null,"finish_reason":null}'
            )
        if completion.finish_reason is not None:
            end = self._choice("", None)
            end["finish_reason"] = self._finish_reason(completion)
            if completion.stop_reason is not None:
                end["stop_reason"] = completion.stop_reason
            found.append(to_json(end))
        return found

    def _finish_reason(self, completion: CompletionOutput) -> str | None:
        return "length" if self._options.scores_only else completion.finish_reason

    def _text(self, completion: CompletionOutput, piece: Piece) -> str:
        """New text; the first has the prompt and its scores in front."""
        text, options = completion.text, self._options
        tokens, entries = completion.token_ids, completion.logprobs
        if options.scores_only:
            text, tokens, entries = "", (), None
        self.num_tokens += len(tokens)
        if not self._has_begun and options.echo:
            text = self._prompt_text + text
            if options.wants_logprobs:
                scores = piece.prompt_logprobs or [None] * len(self._prompt_token_ids)
                pairs = zip(self._prompt_token_ids, scores, strict=True)
                for i, (token_id, entry) in enumerate(pairs):
                    is_left_out = i == 0 and self._is_added(token_id)
                    self._logprobs.add(token_id, entry, is_left_out=is_left_out)
        self._has_begun = True
        if options.wants_logprobs and entries is not None:
            for token_id, entry in zip(tokens, entries, strict=True):
                self._logprobs.add(token_id, entry)
        return text

    def _is_added(self, token_id: int) -> bool:
        """Whether the first token of the prompt was put in front of the text."""
        llm = self._options.names.llm
        is_bos = token_id == llm.get_tokenizer().bos_token_id
        return is_bos and not self._prompt_text.startswith(llm.token_text(token_id))

    def _choice(self, text: str, completion: CompletionOutput | None) -> dict[str, Any]:
        has_scores = self._options.wants_logprobs and completion is not None
        choice: dict[str, Any] = {
            "text": text,
            "index": self._index,
            "logprobs": self._logprobs.take() if has_scores else None,
            "finish_reason": None,
        }
        if self._options.wants_token_ids and completion is not None:
            tokens = () if self._options.scores_only else completion.token_ids
            choice["token_ids"] = list(tokens)
        return choice
