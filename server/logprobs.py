"""Log-probabilities in the three forms that clients know."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jllm import Logprob
from server.llm import Llm

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""

Entry = Mapping[int, Logprob]


@dataclasses.dataclass(frozen=True, slots=True)
class TokenNames:
    """How tokens are written.

    Attributes:
        llm: The model, which knows their text.
        as_ids: Writes "token_id:5" in place of the text.
    """

    llm: Llm
    as_ids: bool = False

    def name(self, token_id: int, entry: Logprob | None = None) -> str:
        """The text of a token."""
        if self.as_ids:
            return f"token_id:{token_id}"
        if entry is not None and entry.decoded_token is not None:
            return entry.decoded_token
        return self.llm.token_text(token_id)


def chat_logprobs(
    entries: Sequence[Entry], names: TokenNames, num_top: int
) -> list[dict[str, Any]]:
    """One object per token, as in chat completions.

    Args:
        entries: Per token, the token itself first.
        names: How tokens are written.
        num_top: Alternatives asked for; -1 is all, and so is what ids were asked for.
    """
    found: list[dict[str, Any]] = []
    for entry in entries:
        token_id, own = next(iter(entry.items()))
        found.append(
            _chat_token(token_id, own, names)
            | {"top_logprobs": [_chat_token(*p, names) for p in _top(entry, num_top)]}
        )
    return found


def _chat_token(token_id: int, entry: Logprob, names: TokenNames) -> dict[str, Any]:
    return {
        "token": names.name(token_id, entry),
        "logprob": max(entry.logprob, LOWEST),
        "bytes": list(names.llm.token_bytes(token_id)),
    }


def _top(entry: Entry, num_top: int) -> list[tuple[int, Logprob]]:
    """The best tokens, best first; ids asked for by number have no rank."""
    if num_top == -1 or any(item.rank is None for item in entry.values()):
        return sorted(entry.items(), key=lambda pair: -pair[1].logprob)
    ranked = [pair for pair in entry.items() if (pair[1].rank or 0) <= num_top]
    return sorted(ranked, key=lambda pair: pair[1].rank or 0)


class CompletionLogprobs:
    """Collects the parallel lists of completions; offsets count in characters."""

    def __init__(self, names: TokenNames) -> None:
        """Begins at the start of the text."""
        self._names = names
        self._offset = 0
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[str] = []
        self._scores: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(
        self, token_id: int, entry: Entry | None, *, is_left_out: bool = False
    ) -> None:
        """Adds a token.

        Args:
            token_id: The token.
            entry: Its score; the first one of a prompt has none.
            is_left_out: It is no part of the text, such as a BOS that was put in front.
        """
        text = self._names.name(token_id, entry[token_id] if entry else None)
        self._tokens.append(text)
        self._offsets.append(self._offset)
        if not is_left_out:
            self._offset += len(self._names.llm.token_text(token_id))
        if entry is None:
            self._scores.append(None)
            self._tops.append(None)
            return
        self._scores.append(max(entry[token_id].logprob, LOWEST))
        top: dict[str, float] = {}
        # Tokens of equal text: the more probable one counts.
        for other_id, other in sorted(entry.items(), key=lambda p: -p[1].logprob):
            name = self._names.name(other_id, other)
            top.setdefault(name, max(other.logprob, LOWEST))
        self._tops.append(top)

    def take(self) -> dict[str, Any]:
        """Gives what was added since the last time."""
        taken = {
            "text_offset": self._offsets,
            "token_logprobs": self._scores,
            "tokens": self._tokens,
            "top_logprobs": self._tops,
        }
        self._clear()
        return taken


def prompt_logprobs(
    entries: Sequence[Entry | None] | None, names: TokenNames
) -> list[dict[str, Any] | None] | None:
    """Scores of a prompt as vLLM gives them: per token, id to score."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": max(item.logprob, LOWEST),
                "rank": item.rank,
                "decoded_token": names.name(token_id, item),
            }
            for token_id, item in entry.items()
        }
        for entry in entries
    ]
