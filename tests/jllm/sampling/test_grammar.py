"""The matcher of one sequence, on a grammar that a list of sets describes."""

import numpy as np
import pytest

from jllm.sampling.grammar import Grammar, GrammarError, Matcher
from tests.fakes import SetsGrammar

VOCAB = 70
END = 1


def matcher(sets, **options):
    options = {"end_ids": (END, 500), "may_end": True} | options
    return Matcher(SetsGrammar(sets, VOCAB), VOCAB, **options)


def ids(mask):
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def test_masks_follow_the_tokens():
    m = matcher([{3, 69}, {4}, {5, 6}])
    assert m.mask().dtype == np.int32
    assert m.mask().shape == (3,)
    assert ids(m.mask()) == {3, 69}
    assert not m.push(69)
    assert ids(m.mask()) == {4}
    assert not m.push(4)
    assert not m.is_complete
    assert m.push(6)
    assert m.is_complete


def test_the_end_is_allowed_where_the_grammar_accepts():
    sets = [{3}, {4}]
    m = matcher(sets, end_ids=(END, 68))
    assert ids(m.mask()) == {3}
    optional = matcher([{3}, {4, None}], end_ids=(END, 68))
    optional.push(3)
    assert ids(optional.mask()) == {4, END, 68}
    never = matcher([{3}, {4, None}], may_end=False)
    never.push(3)
    assert ids(never.mask()) == {4}
    assert never.push(4)


def test_a_grammar_may_ask_for_a_token_that_ends_texts():
    m = matcher([{3}, {END}])
    assert not m.push(3)
    assert ids(m.mask()) == {END}
    assert m.push(END)


def test_only_the_ids_that_are_allowed_are_left():
    m = matcher([{3, 4}, {5, 6, None}, {7}], allowed_ids=(3, 6, END))
    assert ids(m.mask()) == {3}
    m.push(3)
    assert ids(m.mask()) == {6, END}
    # Nothing that is left can follow, and the grammar does not accept.
    assert not m.push(6)
    with pytest.raises(GrammarError, match="none of the tokens"):
        m.mask()


def test_complete_when_what_is_left_is_the_end():
    m = matcher([{3}, {4, None}], allowed_ids=(3,))
    assert m.push(3)


def test_errors_are_raised():
    m = matcher([{3}, {4}])
    with pytest.raises(GrammarError, match="does not take token 9"):
        m.push(9)
    failing = matcher([{3}, {4}, "too complex"])
    failing.push(3)
    with pytest.raises(GrammarError, match="too complex"):
        failing.push(4)


def test_sequences_do_not_share_their_place():
    grammar = SetsGrammar([{3}, {4}], VOCAB)
    one, two = (Matcher(grammar, VOCAB, end_ids=(), may_end=True) for _ in range(2))
    one.push(3)
    assert ids(one.mask()) == {4}
    assert ids(two.mask()) == {3}


def test_vocabularies_of_other_widths_are_cut_or_filled():
    wide = Matcher(SetsGrammar([{3, 200}], 256), VOCAB, end_ids=(), may_end=True)
    assert ids(wide.mask()) == {3}
    narrow = Matcher(SetsGrammar([{3}], 8), VOCAB, end_ids=(), may_end=True)
    assert ids(narrow.mask()) == {3}


def test_a_grammar_copies_its_prototype():
    class Prototype:
        def deep_copy(self):
            return "copy"

    grammar = Grammar(Prototype(), 17)
    assert (grammar.copy(), grammar.num_bytes) == ("copy", 17)
