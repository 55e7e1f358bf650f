"""Bounds the reasoning of an output in tokens, on the host, and what comes behind it.

It has the interface of `jllm.sampling.grammar.Matcher` and stands before one: while the
model thinks it may write anything; the grammar begins behind.
"""

import dataclasses
import math

import numpy as np

from jllm.sampling.grammar import GrammarError, Matcher
from jllm.sampling.rules import BITS

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Thinking:
    """How reasoning is written in tokens, and how long it may be.

    Attributes:
        start_ids: Marker that begins it.
        end_ids: Marker that ends it.
        other_ends: Further sequences that end it.
        budget: Most tokens between the markers; None is any number.
        is_open: Whether the output begins within it; None leaves that to the model.
    """

    start_ids: Ids
    end_ids: Ids
    other_ends: tuple[Ids, ...] = ()
    budget: int | None = None
    is_open: bool | None = None

    @property
    def all_ids(self) -> Ids:
        """The tokens of all markers."""
        ids = (self.start_ids, self.end_ids, *self.other_ends)
        return tuple(token for marker in ids for token in marker)


class ThinkingMatcher:
    """The place of one sequence in its reasoning, then in its grammar."""

    def __init__(
        self, thinking: Thinking, vocab_size: int, then: Matcher | None, end_ids: Ids
    ) -> None:
        """Starts at the beginning of the output.

        Args:
            thinking: What bounds the reasoning.
            vocab_size: Width of the logits.
            then: Grammar of what follows; None for any text.
            end_ids: Tokens that end a text; with a grammar not before it.
        """
        self._thinking = thinking
        self._then = then
        self._free = np.full(math.ceil(vocab_size / BITS), -1, np.int32)
        if then is not None:
            # A tokenizer may know more tokens than the model.
            for token in (token for token in end_ids if token < vocab_size):
                self._free &= ~self._only(token)
        # Markers that may be complete soon, by how much of them has been sampled.
        self._recent: list[int] = []
        self._num_recent = max(
            map(len, (thinking.start_ids, thinking.end_ids, *thinking.other_ends))
        )
        self._count = 0
        self._is_inside = bool(thinking.is_open)
        self._is_behind = thinking.is_open is False
        self._is_opening = False

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow what was pushed."""
        return self._is_behind and self._then is not None and self._then.is_complete

    def mask(self) -> np.ndarray:
        """Bit set of the tokens that may come next, int32 words.

        Raises:
            GrammarError: See `Matcher.mask`.
        """
        thinking = self._thinking
        if self._is_inside:
            if thinking.budget is None or self._count < thinking.budget:
                return self._free
            # Part of the marker may stand there already.
            return self._only(thinking.end_ids[self._progress(thinking.end_ids)])
        if self._then is None:
            return self._free
        if self._is_behind:
            return self._then.mask()
        start = thinking.start_ids
        if self._is_opening:
            return self._only(start[self._progress(start)])
        return self._then.mask() | self._only(start[0])

    def push(self, token_id: int) -> bool:
        """Goes on by a sampled token; returns whether nothing can follow.

        Raises:
            GrammarError: See `Matcher.push`.
        """
        if self._is_behind:
            return self._then is not None and self._then.push(token_id)
        if not self._is_inside and self._then is not None and not self._is_opening:
            if token_id != self._thinking.start_ids[0] or self._may_answer(token_id):
                self._is_behind = True
                return self._then.push(token_id)
            self._is_opening = True
        self._recent = [*self._recent, token_id][-self._num_recent :]
        if self._is_inside:
            self._push_inside()
        elif self._ends_with(self._thinking.start_ids):
            self._is_inside, self._is_opening, self._recent = True, False, []
        return False

    def _push_inside(self) -> None:
        self._count += 1
        ends = (self._thinking.end_ids, *self._thinking.other_ends)
        ended = next((ids for ids in ends if self._ends_with(ids)), None)
        if ended is None:
            return
        begins_answer = ended != self._thinking.end_ids and self._then is not None
        if begins_answer and not self._may_answer(ended[0]):
            return
        self._is_inside, self._is_behind = False, True
        for token in ended if begins_answer else ():
            self.push(token)

    def _may_answer(self, token_id: int) -> bool:
        """Whether the grammar of what follows could begin with the token."""
        assert self._then is not None
        try:
            return bool((self._then.mask() & self._only(token_id)).any())
        except GrammarError:
            return False

    def _ends_with(self, ids: Ids) -> bool:
        return bool(ids) and tuple(self._recent[-len(ids) :]) == ids

    def _progress(self, ids: Ids) -> int:
        """How many of the first ids the last tokens are."""
        for count in range(len(ids) - 1, 0, -1):
            if tuple(self._recent[-count:]) == ids[:count]:
                return count
        return 0

    def _only(self, token_id: int) -> np.ndarray:
        words = np.zeros(len(self._free), np.uint32)
        words[token_id // BITS] = np.uint32(1 << (token_id % BITS))
        return words.view(np.int32)
