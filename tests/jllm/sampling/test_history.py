"""Counts and endings of contexts."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jllm.sampling.history import CHUNK, banned_by_words, count_tokens
from jllm.sampling.rules import RowRules, RuleLayout, unpack_rules
from tests.jllm.sampling.oracle import Spec

VOCAB = 12
count = jax.jit(count_tokens, static_argnums=3)


def test_counts_from_the_first_position_to_the_length(make_history):
    rng = np.random.default_rng(1)
    contexts = [tuple(rng.integers(0, VOCAB, n).tolist()) for n in (1, 5, CHUNK + 9)]
    history = make_history([Spec(prompt=c) for c in contexts], vocab_size=VOCAB)
    for first in ([0, 0, 0], [1, 3, 7]):
        starts = jnp.asarray(first, jnp.int32)
        counts = np.asarray(count(history, starts, jnp.ones(3, bool), VOCAB))
        for row, context in enumerate(contexts):
            expected = Counter(context[first[row] :])
            assert counts[row].tolist() == [expected[token] for token in range(VOCAB)]


def test_rows_not_wanted_count_nothing(make_history):
    history = make_history([Spec(prompt=(1, 2)), Spec(prompt=(3,))], vocab_size=VOCAB)
    wanted = jnp.asarray([False, True])
    counts = np.asarray(count(history, jnp.zeros(2, jnp.int32), wanted, VOCAB))
    assert counts.sum(axis=1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("output", "banned"),
    [
        ((), {7}),
        ((1,), {7, 2}),
        ((1, 2), {7, 3}),
        ((9, 1, 2), {7, 3}),
        ((1, 9), {7}),
        ((2,), {7}),
        ((1, 2, 1), {7, 2}),
    ],
)
def test_words_end_the_output(make_history, make_rules, output, banned):
    words = ((7,), (1, 2), (1, 2, 3))
    rules = RowRules(bad_words_token_ids=words)
    # The prompt ends like a bad word begins: it does not count.
    spec = Spec(prompt=(1, 2), output=output, rules=rules)
    layout = RuleLayout(VOCAB)
    unpacked = unpack_rules(layout, make_rules([spec], vocab_size=VOCAB))
    history = make_history([spec], vocab_size=VOCAB)
    mask = np.asarray(banned_by_words(history, jnp.asarray([2]), unpacked))[0]
    tokens = np.asarray(unpacked.bad_tokens)[0]
    assert set(tokens[mask & (tokens < VOCAB)].tolist()) == banned
