"""Each rule against its obvious float64 version."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jllm.sampling import transforms
from jllm.sampling.rows import SamplingRows
from jllm.sampling.rules import RowRules, RuleLayout, unpack_rules
from tests.jllm.sampling import oracle
from tests.jllm.sampling.oracle import Spec

SIZES = [1, 7, 130]
TEMPERATURE = 0.5
ORDINARY = st.floats(-20, 20, width=32, allow_subnormal=False)
SCORES = ORDINARY | st.sampled_from([-np.inf, -1e30, 0.0, 1.0, 1e30])

add_bias = jax.jit(
    lambda scores, rules: transforms.add_bias(scores, rules.bias_ids, rules.bias_values)
)
apply_penalties = jax.jit(transforms.apply_penalties)
ban_unless_allowed = jax.jit(transforms.ban_unless_allowed)
ban_early_stop = jax.jit(transforms.ban_early_stop)
ban_bad_words = jax.jit(transforms.ban_bad_words)
keep_best = jax.jit(transforms.keep_best_if_all_banned)


def neutral_rows(**changes):
    zeros, whole = jnp.zeros(2), jnp.zeros(2, jnp.int32)
    rows = SamplingRows(
        temperature=jnp.full(2, TEMPERATURE),
        top_p=jnp.ones(2),
        top_k=whole,
        min_p=zeros,
        presence=zeros,
        frequency=zeros,
        repetition=jnp.ones(2),
        seed=jnp.zeros((2, 2), jnp.uint32),
        position=whole,
        prompt_len=whole,
        min_tokens=whole,
    )
    return dataclasses.replace(rows, **changes)


@jax.jit
def apply_top_k(scores, k):
    rows = neutral_rows(top_k=k)
    return transforms.apply_top_k_top_p(scores, rows, transforms.ThresholdSearch())


@jax.jit
def apply_top_p(scores, p):
    rows = neutral_rows(top_p=p)
    return transforms.apply_top_k_top_p(scores, rows, transforms.ThresholdSearch())


@jax.jit
def apply_min_p(scores, share):
    return transforms.apply_min_p(scores, share, jnp.full(2, TEMPERATURE))


def rows_of_scores(vocab_size):
    """Two rows, each with at least one finite score."""
    elements = hnp.arrays(np.float32, (2, vocab_size), elements=SCORES, fill=SCORES)
    return elements.filter(lambda scores: (scores > -np.inf).any(axis=1).all())


def both(rule, scores, value, dtype=jnp.float32):
    """The rule on two rows, the first with a neutral parameter by `value`."""
    return np.asarray(rule(jnp.asarray(scores), jnp.asarray(value, dtype)))


def assert_same_bits(left, right):
    np.testing.assert_array_equal(
        np.asarray(left).view(np.int32), np.asarray(right).view(np.int32)
    )


def kept(scores):
    return scores > -np.inf


@pytest.fixture
def contexts():
    rng = np.random.default_rng(3)

    def tokens(n):
        return tuple(rng.integers(0, 30, n).tolist())

    return [
        Spec(prompt=tokens(20), output=tokens(40), repetition=1.3),
        Spec(prompt=tokens(300), output=tokens(200), presence=0.7),
        Spec(prompt=tokens(9), output=tokens(20), frequency=-1.1, repetition=0.5),
        Spec(prompt=tokens(9), output=(), presence=2.0, frequency=2.0),
        Spec(prompt=tokens(50), output=tokens(50)),
    ]


def test_penalties(contexts, make_rows, make_history):
    scores = np.random.default_rng(0).normal(size=(5, 37)).astype(np.float32) * 5
    scores[:, 3] = -np.inf
    history = make_history(contexts, vocab_size=30)
    out = apply_penalties(jnp.asarray(scores), make_rows(contexts), history)
    expected = [
        oracle.penalize(row.astype(np.float64), spec)
        for row, spec in zip(scores, contexts, strict=True)
    ]
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    assert_same_bits(out[4], scores[4])


@pytest.mark.parametrize("vocab_size", SIZES)
def test_bias(vocab_size, make_rules):
    bias = {token: 0.5 * token - 3 for token in range(0, vocab_size, 3)}
    specs = [Spec(rules=RowRules(logit_bias=bias)), Spec()]
    rules = unpack_rules(
        RuleLayout(vocab_size), make_rules(specs, vocab_size=vocab_size)
    )
    scores = np.random.default_rng(0).normal(size=(2, vocab_size)).astype(np.float32)
    out = add_bias(jnp.asarray(scores), rules)
    np.testing.assert_allclose(out[0], oracle.add_bias(scores[0], specs[0]), rtol=1e-6)
    assert_same_bits(out[1], scores[1])


@pytest.mark.parametrize("vocab_size", SIZES)
def test_allowed(vocab_size, make_rules):
    allowed = tuple(sorted({0, vocab_size - 1, vocab_size // 2}))
    specs = [Spec(rules=RowRules(allowed_token_ids=allowed)), Spec()]
    rules = unpack_rules(
        RuleLayout(vocab_size), make_rules(specs, vocab_size=vocab_size)
    )
    scores = np.random.default_rng(0).normal(size=(2, vocab_size)).astype(np.float32)
    out = ban_unless_allowed(jnp.asarray(scores), rules.allowed)
    assert_same_bits(out[0], oracle.mask(scores[0], specs[0]))
    assert_same_bits(out[1], scores[1])


def test_masks_by_context(make_rows, make_rules, make_history):
    rules = RowRules(stop_token_ids=(2, 5), bad_words_token_ids=((1, 4), (0,)))
    specs = [
        Spec(output=(3, 1), min_tokens=3, rules=rules),
        Spec(output=(3, 1, 3), min_tokens=3, rules=rules),
        Spec(prompt=(3, 1), output=(), rules=rules),
        Spec(prompt=(3, 1), output=(1,), min_tokens=9),
    ]
    unpacked = unpack_rules(RuleLayout(8), make_rules(specs, vocab_size=8))
    rows, history = make_rows(specs), make_history(specs, vocab_size=8)
    scores = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    out = ban_early_stop(jnp.asarray(scores), rows, unpacked.stop_ids)
    out = np.asarray(ban_bad_words(out, rows, history, unpacked))
    for row, spec in enumerate(specs):
        assert_same_bits(out[row], oracle.mask(scores[row], spec))


def test_all_banned_leaves_the_best():
    scores = jnp.asarray([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    masked = jnp.asarray([[-jnp.inf] * 3, [1.0, -jnp.inf, -jnp.inf]])
    out = np.asarray(keep_best(scores, masked))
    np.testing.assert_array_equal(out[0], [-np.inf, 3.0, -np.inf])
    assert_same_bits(out[1], masked[1])


@pytest.mark.parametrize("vocab_size", SIZES)
def test_top_k(vocab_size):
    @given(rows_of_scores(vocab_size), st.integers(-1, vocab_size + 1))
    def check(scores, k):
        out = both(apply_top_k, scores, [0, k], jnp.int32)
        assert_same_bits(out[0], scores[0])
        assert_same_bits(out[1], oracle.top_k(scores[1], k))

    check()


@pytest.mark.parametrize("vocab_size", SIZES)
def test_top_p(vocab_size):
    @given(rows_of_scores(vocab_size), st.floats(2**-10, 1.0, width=32))
    def check(scores, p):
        out = both(apply_top_p, scores, [1.0, p])
        assert_same_bits(out[0], scores[0])
        if p == 1:
            assert_same_bits(out[1], scores[1])
            return
        # Only where the mass is p to within rounding may float32 differ.
        mass = oracle.mass_of_better(scores[1].astype(np.float64) / TEMPERATURE)
        finite = kept(scores[1])
        assert kept(out[1])[finite & (mass < p - 1e-5)].all()
        assert not kept(out[1])[mass > p + 1e-5].any()
        assert_same_bits(out[1][kept(out[1])], scores[1][kept(out[1])])
        least = out[1][kept(out[1])].min()
        assert (kept(out[1]) == (scores[1] >= least)).all()

    check()


@pytest.mark.parametrize("vocab_size", SIZES)
def test_min_p(vocab_size):
    @given(rows_of_scores(vocab_size), st.floats(2**-10, 1.0, width=32))
    def check(scores, share):
        out = both(apply_min_p, scores, [0.0, share])
        assert_same_bits(out[0], scores[0])
        exact = scores[1].astype(np.float64) / TEMPERATURE
        relative = np.exp(exact - exact.max())
        assert kept(out[1])[relative > share * (1 + 1e-5)].all()
        assert not kept(out[1])[relative < share * (1 - 1e-5)].any()
        assert kept(out[1])[scores[1].argmax()]

    check()


def test_ties_at_the_threshold_are_kept():
    scores = np.array([[2.0, 1.0, 1.0, 1.0, 0.0]] * 2, np.float32)
    expected = [True, True, True, True, False]
    assert kept(both(apply_top_k, scores, [2, 3], jnp.int32)).tolist() == [expected] * 2
    assert kept(both(apply_top_p, scores, [0.8, 0.9])).tolist() == [expected] * 2


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("value", [-np.inf, 1e30, -1e30])
def test_extreme_rows_are_never_nan(vocab_size, value):
    scores = np.full((2, vocab_size), value, np.float32)
    for rule, parameter, dtype in (
        (apply_top_k, [1, 2], jnp.int32),
        (apply_top_p, [0.1, 0.999], jnp.float32),
        (apply_min_p, [0.1, 1.0], jnp.float32),
    ):
        assert not np.isnan(both(rule, scores, parameter, dtype)).any()
