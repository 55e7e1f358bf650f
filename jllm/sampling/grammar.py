"""Follows an output through a grammar, on the host: which tokens may come next.

The automaton is llguidance's. It lives on the host because its state is a parser's; the
device sees one bit set per step and row, see `Rules.allowed`.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from jllm.sampling.rules import BITS


class GrammarError(Exception):
    """A grammar cannot go on: a limit was reached, or a token is not in it."""


class Grammar:
    """A compiled grammar, from which each sequence gets a matcher of its own."""

    def __init__(self, prototype: Any, num_bytes: int) -> None:
        """Takes over an `LLMatcher` at its start.

        Args:
            prototype: The matcher that is copied; nobody else may use it.
            num_bytes: Estimate of the memory it takes.
        """
        self._prototype = prototype
        self.num_bytes = num_bytes

    def copy(self) -> Any:
        """An `LLMatcher` at its start."""
        return self._prototype.deep_copy()


class Matcher:
    """The place of one sequence in its grammar.

    Nothing is copied before the first mask is asked for, so that waiting sequences cost
    nothing.
    """

    def __init__(
        self,
        grammar: Any,
        vocab_size: int,
        *,
        end_ids: Iterable[int],
        may_end: bool,
        allowed_ids: Iterable[int] | None = None,
    ) -> None:
        """Starts at the beginning of the grammar.

        Args:
            grammar: A `Grammar`.
            vocab_size: Width of the logits.
            end_ids: Tokens that end a text and are no part of it.
            may_end: Whether one of them may be sampled where the grammar is complete.
            allowed_ids: Ids that may be sampled at all; None is all.
        """
        self._grammar = grammar
        self._state: Any = None
        self._num_words = math.ceil(vocab_size / BITS)
        self._ends = _bit_set(self._num_words, end_ids)
        self._may_end = may_end
        self._allowed = (
            None if allowed_ids is None else _bit_set(self._num_words, allowed_ids)
        )
        self._mask: np.ndarray | None = None
        self._is_complete = False

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow what was pushed."""
        return self._is_complete

    def mask(self) -> np.ndarray:
        """Bit set of the tokens that may come next, int32 words.

        Raises:
            GrammarError: A limit was reached, or no token is possible.
        """
        if self._mask is None:
            self._mask = self._next_mask()
        if not self._mask.any():
            raise GrammarError("the grammar allows none of the tokens that are left")
        return self._mask

    def push(self, token_id: int) -> bool:
        """Goes on by a sampled token; returns whether the grammar can only end now.

        Raises:
            GrammarError: The token is not in the grammar, or `mask` failed.
        """
        state = self._start()
        self._mask = None
        if not state.consume_token(token_id):
            raise GrammarError(f"the grammar does not take token {token_id}")
        self._is_complete = state.is_stopped()
        self._raise_error(state)
        if not self._is_complete:
            self._mask = self._next_mask()
            is_dead_end = not np.any(self._mask & ~self._ends)
            self._is_complete = is_dead_end and state.is_accepting()
        return self._is_complete

    def _start(self) -> Any:
        if self._state is None:
            self._state = self._grammar.copy()
        return self._state

    def _next_mask(self) -> np.ndarray:
        state = self._start()
        try:
            data = state.compute_bitmask()
        except ValueError as error:
            raise GrammarError(_first_line(str(error))) from error
        self._raise_error(state)
        words = np.zeros(self._num_words, np.int32)
        # The tokenizer may know fewer tokens than the model, or more.
        known = np.frombuffer(data, "<i4")[: self._num_words]
        words[: len(known)] = known
        # Elsewhere an end is possible only where the grammar itself asks for the token.
        if state.is_accepting():
            words = words | self._ends if self._may_end else words & ~self._ends
        if self._allowed is not None:
            words &= self._allowed
        return words

    @staticmethod
    def _raise_error(state: Any) -> None:
        if state.is_error():
            raise GrammarError(_first_line(state.get_error()))


def _bit_set(num_words: int, ids: Iterable[int]) -> np.ndarray:
    bits = np.zeros(num_words * BITS, np.uint8)
    bits[[token for token in ids if token < len(bits)]] = 1
    return np.packbits(bits, bitorder="little").view("<i4")


def _first_line(text: str) -> str:
    return (text.splitlines() or ["it failed"])[0]
