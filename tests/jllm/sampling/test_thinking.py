"""Reasoning ends within its budget, and the grammar begins behind it."""

import numpy as np
import pytest

from jllm.sampling.grammar import GrammarError, Matcher
from jllm.sampling.thinking import Thinking, ThinkingMatcher

VOCAB = 70
EOS = 69
START, END = (1, 2), (3, 4)
FREE = set(range(VOCAB))


class Letters(Matcher):
    """A grammar of the tokens 10, 11, 12 in turn."""

    def __init__(self):
        self.pushed = []

    @property
    def is_complete(self):
        return len(self.pushed) == 3

    def mask(self):
        return bits({10 + len(self.pushed)})

    def push(self, token):
        if token != 10 + len(self.pushed):
            raise GrammarError("no")
        self.pushed.append(token)
        return self.is_complete


def bits(ids):
    words = np.zeros(3 * 32, np.uint8)
    words[list(ids)] = 1
    return np.packbits(words, bitorder="little").view("<i4")


def allowed(matcher):
    bytes_ = matcher.mask().view(np.uint8)
    return set(np.flatnonzero(np.unpackbits(bytes_, bitorder="little")).tolist()) & FREE


def make(then=None, **options):
    options = {"start_ids": START, "end_ids": END, **options}
    return ThinkingMatcher(Thinking(**options), VOCAB, then, (EOS,))


def run(matcher, tokens):
    """Pushes tokens that the matcher allows; returns what it allows then."""
    for token in tokens:
        assert token in allowed(matcher)
        matcher.push(token)
    return allowed(matcher)


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_end_is_forced_at_the_budget(budget):
    matcher = make(budget=budget, is_open=True)
    for _ in range(budget):
        assert run(matcher, []) == FREE
        matcher.push(50)
    assert run(matcher, []) == {3}
    assert run(matcher, [3]) == {4}
    assert run(matcher, [4]) == FREE
    assert run(matcher, [50] * 20) == FREE
    assert not matcher.is_complete


def test_reasoning_that_ends_itself():
    matcher = make(budget=5, is_open=True)
    assert run(matcher, [50, 3, 4] + [50] * 20) == FREE


def test_end_that_is_under_way_is_completed():
    assert run(make(budget=2, is_open=True), [50, 3]) == {4}


def test_only_what_follows_the_start_is_counted():
    matcher = make(budget=2)
    assert run(matcher, [50] * 9) == FREE
    assert run(matcher, [1, 50, 1, 2]) == FREE
    assert run(matcher, [50, 50]) == {3}


def test_reasoning_that_is_switched_off():
    assert run(make(budget=0, is_open=False), [50] * 5) == FREE


def test_grammar_begins_behind_reasoning():
    letters = Letters()
    matcher = make(letters, is_open=True)
    # The text must not end before the grammar has begun.
    assert run(matcher, [50] * 30) == FREE - {EOS}
    assert run(matcher, [3, 4]) == {10}
    assert run(matcher, [10, 11]) == {12}
    assert not matcher.is_complete
    assert matcher.push(12)
    assert matcher.is_complete


def test_grammar_behind_a_forced_end():
    assert run(make(Letters(), budget=1, is_open=True), [50, 3, 4]) == {10}


def test_model_chooses_to_think_or_to_answer():
    assert run(make(Letters()), []) == {1, 10}
    assert run(make(Letters()), [10]) == {11}
    assert run(make(Letters()), [1]) == {2}
    assert run(make(Letters()), [1, 2]) == FREE - {EOS}
    assert run(make(Letters()), [1, 2, 50, 3, 4]) == {10}
    assert run(make(Letters(), is_open=False), []) == {10}


def test_call_ends_reasoning():
    letters = Letters()
    matcher = make(letters, is_open=True, other_ends=((10,), (20,)), budget=3)
    # What cannot begin the answer is reasoning like any other token.
    assert run(matcher, [20]) == FREE - {EOS}
    assert run(matcher, [10]) == {11}
    assert letters.pushed == [10]
    assert (
        run(make(is_open=True, other_ends=((10,),), budget=2), [10] + [50] * 9) == FREE
    )


def test_failures_of_the_grammar_are_told():
    matcher = make(Letters(), is_open=False)
    with pytest.raises(GrammarError):
        matcher.push(50)
