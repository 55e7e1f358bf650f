"""Reading a text that is still being written.

A format is written as a generator over a `Reader`: it yields where it needs more text.
Every question to the reader is about the whole text, never about what happens to have
arrived, so a result cannot depend on how the text was cut. Nothing is read twice and
less than the longest marker is held back, so the time is linear in the text.
"""

import functools
import re
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A part of a parser: yields when it needs more text, returns what it found."""


class Reader:
    """The unread rest of a growing text."""

    def __init__(self) -> None:
        """Begins with no text."""
        self._text = ""
        self._at = 0
        self._ended = False
        self._recorded: list[str] | None = None

    def feed(self, text: str) -> None:
        """Appends text."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """Tells that no more text comes."""
        self._ended = True

    @property
    def num_held(self) -> int:
        """Number of characters that have arrived and are not read."""
        return len(self._text) - self._at

    def put_back(self, text: str) -> None:
        """Makes a marker that has been read the next text to read."""
        self._text = text + self._text[self._at :]
        self._at = 0

    def record(self, text: str = "") -> None:
        """Keeps what is read from here on, behind this text, for `recorded`."""
        self._recorded = [text]

    def recorded(self) -> str:
        """What was read since `record`; ends the recording."""
        text = "".join(self._recorded or ())
        self._recorded = None
        return text

    def peek(self) -> Steps[str]:
        """The next character, empty at the end of the text."""
        while self._at == len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def take(self, count: int) -> str:
        """Reads characters that have arrived."""
        text = self._text[self._at : self._at + count]
        self._at += count
        if self._recorded is not None:
            self._recorded.append(text)
        return text

    def take_run(self, characters: re.Pattern[str]) -> str:
        """Reads what has arrived of a run of characters, by a pattern for such runs."""
        found = characters.match(self._text, self._at)
        return self.take(found.end() - self._at) if found else ""

    def skip(self, characters: re.Pattern[str]) -> Steps[str]:
        """Reads a run to its end; returns the character behind it."""
        while True:
            self.take_run(characters)
            if self._at < len(self._text) or self._ended:
                return (yield from self.peek())
            yield

    def run(self, characters: re.Pattern[str]) -> Steps[str]:
        """Reads a run to its end and returns it."""
        parts: list[str] = []
        while True:
            parts.append(self.take_run(characters))
            if self._at < len(self._text) or self._ended:
                return "".join(parts)
            yield

    def accept(self, *literals: str) -> Steps[str]:
        """Reads the first of the literals that the text goes on with, else nothing.

        Returns:
            That literal, or the empty string.
        """
        while True:
            rest = self._text[self._at : self._at + max(map(len, literals))]
            for literal in literals:
                if rest.startswith(literal):
                    return self.take(len(literal))
                if literal.startswith(rest) and not self._ended:
                    break
            else:
                return ""
            yield

    def piece(self, markers: frozenset[str]) -> Steps[tuple[str, str]]:
        """Reads on to a marker, or as far as no marker can begin.

        Args:
            markers: Strings none of which is within another.

        Returns:
            Text without a marker, and the marker behind it, empty where only more of
            the text follows; both are empty at the end of the text.
        """
        pattern, beginnings, longest = _compiled(markers)
        while True:
            found = pattern.search(self._text, self._at)
            if found:
                text = self.take(found.start() - self._at)
                return text, self.take(found.end() - found.start())
            safe = self.num_held
            if not self._ended:
                safe -= self._num_uncertain(beginnings, longest)
            if safe or self._ended:
                return self.take(safe), ""
            yield

    def _num_uncertain(self, beginnings: frozenset[str], longest: int) -> int:
        """Length of the longest end of the text with which a marker begins."""
        for count in range(min(longest - 1, self.num_held), 0, -1):
            if self._text[len(self._text) - count :] in beginnings:
                return count
        return 0


@functools.lru_cache(maxsize=256)
def _compiled(markers: frozenset[str]) -> tuple[re.Pattern[str], frozenset[str], int]:
    """A pattern for any of the markers, their beginnings, and the longest's length."""
    # What is empty is never found.
    pattern = "|".join(map(re.escape, sorted(markers))) or "(?!)"
    beginnings = frozenset(m[:end] for m in markers for end in range(1, len(m)))
    return re.compile(pattern), beginnings, max(map(len, markers), default=0)
