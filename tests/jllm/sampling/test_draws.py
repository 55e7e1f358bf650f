"""Draws: exact where they must be, and by chi-square where chance decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jllm.sampling.draws import DRAWS, row_keys
from tests.jllm.sampling import oracle

METHODS = sorted(DRAWS)
NUM_DRAWS = 20_000


def draw(method, scores):
    ones = jnp.ones(scores.shape[0])
    return np.asarray(jax.jit(DRAWS[method])(scores, ones, keys(scores.shape[0])))


def keys(count, seed=1, first=0):
    seeds = jnp.asarray([[seed & 0xFFFFFFFF, seed >> 32]] * count, jnp.uint32)
    return row_keys(seeds, jnp.arange(first, first + count, dtype=jnp.int32))


def key_data(count, **settings):
    return np.asarray(jax.random.key_data(keys(count, **settings)))


def test_keys_depend_on_both_words_of_the_seed_and_on_the_position():
    seeds = (0, 1, 2**32, 2**64 - 1)
    data = np.concatenate([key_data(50, seed=seed) for seed in seeds])
    assert len(np.unique(data, axis=0)) == len(data)


def test_keys_do_not_depend_on_the_row():
    np.testing.assert_array_equal(key_data(50)[30:], key_data(20, first=30))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("vocab_size", [1, 7, 300])
def test_frequencies_are_the_softmax(method, vocab_size):
    rng = np.random.default_rng(0)
    scores = (rng.normal(size=vocab_size) * 2).astype(np.float32)
    scores[vocab_size // 2 + 1 :: 3] = -np.inf
    many = jnp.broadcast_to(jnp.asarray(scores), (NUM_DRAWS, vocab_size))
    tokens = draw(method, many)
    counts = np.bincount(tokens, minlength=vocab_size)
    expected = oracle.softmax(scores.astype(np.float64)) * NUM_DRAWS
    assert counts[expected == 0].sum() == 0
    likely = expected > 5
    rest = expected[~likely].sum()
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(expected[likely], rest)
    if rest < 1e-9:
        observed, expected = observed[:-1], expected[:-1]
    if len(observed) > 1:
        assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("vocab_size", [1, 7, 130, 1000])
def test_only_possible_tokens(method, vocab_size):
    possible = np.random.default_rng(0).integers(0, vocab_size, 64)
    scores = np.full((64, vocab_size), -np.inf, np.float32)
    scores[np.arange(64), possible] = np.linspace(-1e30, 1e30, 64)
    tokens = draw(method, jnp.asarray(scores))
    np.testing.assert_array_equal(tokens, possible)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan, 0.0])
def test_ids_of_the_vocabulary_whatever_the_scores(method, value):
    scores = jnp.full((64, 130), value, jnp.float32)
    tokens = draw(method, scores)
    assert ((tokens >= 0) & (tokens < 130)).all()
