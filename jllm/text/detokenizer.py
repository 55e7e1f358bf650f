"""Tokens to text as they come, and the strings at which the text stops."""

import codecs
from collections.abc import Sequence

from jllm.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
PROMPT_CONTEXTS = (6, 12, 24)
"""Last prompt tokens that are decoded with the first new ones; longer where a shorter
piece starts within a character."""


class Detokenizer:
    """Gives the text of one sequence piece by piece; never half a character.

    The pieces together are the text of all tokens decoded at once. Where the tokenizer
    joins bytes, so does this, without asking it. Elsewhere each token is decoded
    together with the few before it, since decoders treat the first token apart and
    spread characters over tokens; the cost per token does not grow with the text.
    Only where bytes that are no UTF-8 follow a character made of byte tokens, a decoder
    would take back that character; here it stays.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        """Starts behind a prompt, whose own text is not given again."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._joins_added = not spaces_between_special_tokens
        self._last_was_added = False
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []
        # Makes the text where bytes are joined; elsewhere it is only there to know
        # whether the tokens so far end within a character.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._joins_bytes = tokenizer.joins_bytes
        self._set_prompt(prompt_token_ids)

    def push(self, token_id: int) -> str:
        """Takes one more token; returns the text that is certain now."""
        if self._joins_bytes:
            if token_id in self._skipped:
                return ""
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        if token_id in self._skipped or self._tokenizer.token(token_id) is None:
            return ""
        added = self._tokenizer.added_token(token_id)
        joins = self._joins_added and self._last_was_added and added is not None
        self._last_was_added = added is not None
        if added is not None and joins:
            return self.flush() + self._set_context([token_id], added)
        self._pending.append(token_id)
        return "" if self._ends_within_character([token_id]) else self.flush()

    def flush(self) -> str:
        """Returns what was held back, with U+FFFD for an unfinished character."""
        if self._joins_bytes:
            text = self._utf8.decode(b"", final=True)
            self._utf8.reset()
            return text
        released, self._pending = self._pending, []
        self._utf8.reset()
        return self._set_context(released, self._new_text(released))

    def _set_context(self, token_ids: list[int], text: str) -> str:
        """Makes the tokens the context of those to come; returns their text."""
        if token_ids:
            self._context = token_ids
            self._context_text = self._decode(token_ids)
        return text

    def _new_text(self, token_ids: list[int]) -> str:
        """The text of tokens that follow the context."""
        text = self._decode(self._context + token_ids)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # Bytes that are no UTF-8 have spoilt the context too.
        return self._decode(token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special=False)

    def _set_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        kept = [
            token_id
            for token_id in prompt_token_ids[-2 * PROMPT_CONTEXTS[-1] :]
            if token_id not in self._skipped
        ]
        if self._joins_bytes:
            # A character has at most four bytes, and a token at least one.
            self._ends_within_character(kept[-PROMPT_CONTEXTS[0] :])
            return
        for size in PROMPT_CONTEXTS:
            self._context = kept[-size:]
            self._context_text = self._decode(self._context)
            if REPLACEMENT not in self._context_text:
                break
        if self._ends_within_character(self._context):
            # The output may complete the character, and then gives it as a whole.
            self._context_text = self._context_text.rstrip(REPLACEMENT)

    def _ends_within_character(self, new_token_ids: list[int]) -> bool:
        for token_id in new_token_ids:
            self._utf8.decode(self._tokenizer.token_bytes(token_id))
        return bool(self._utf8.getstate()[0])


class StopStrings:
    """Cuts a text at the first of some strings, however its pieces are cut.

    The string that is complete first wins, the longest of those complete at once. Text
    is held back only while it may be the start of one of them.
    """

    def __init__(self, stops: Sequence[str], *, include_in_output: bool) -> None:
        """Prepares the strings; none may be empty."""
        # Longest first, so that it is found first.
        ordered = sorted(stops, key=len, reverse=True)
        self._matchers = [_Matcher(stop) for stop in ordered]
        self._include = include_in_output
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Takes more text.

        Returns:
            The text that is certain now, and the stop string once it is complete.
        """
        if not self._matchers:
            return text, None
        buffer = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            complete = [m.stop for m in self._matchers if m.advance(character)]
            if complete:
                stop = complete[0]
                self._held = ""
                return buffer[: end if self._include else end - len(stop)], stop
        open_length = max(m.length for m in self._matchers)
        certain = len(buffer) - open_length
        self._held = buffer[certain:]
        return buffer[:certain], None

    def flush(self) -> str:
        """Returns what was held back, when no more text will come."""
        held, self._held = self._held, ""
        for matcher in self._matchers:
            matcher.reset()
        return held


class _Matcher:
    """Finds one string in a stream of characters (Knuth, Morris, Pratt 1977)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        self._borders = _borders(stop)

    def advance(self, character: str) -> bool:
        """Takes one character; `length` is then the longest start of `stop` seen."""
        while self.length and self.stop[self.length] != character:
            self.length = self._borders[self.length - 1]
        if self.stop[self.length] == character:
            self.length += 1
        if self.length < len(self.stop):
            return False
        self.length = 0
        return True

    def reset(self) -> None:
        """Forgets the characters seen."""
        self.length = 0


def _borders(text: str) -> list[int]:
    """For each prefix the length of its longest proper prefix that also ends it."""
    borders = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = borders[length - 1]
        if text[i] == text[length]:
            length += 1
        borders[i] = length
    return borders
