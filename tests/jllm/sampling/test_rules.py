"""Packing and unpacking of the rules of a row."""

import jax.numpy as jnp
import numpy as np
import pytest

from jllm.errors import InvalidRequestError
from jllm.sampling.rules import (
    MAX_BAD_WORD_TOKENS,
    NO_TOKEN,
    RowRules,
    RuleLayout,
    pack_rules,
    unpack_rules,
)
from jllm.types import MAX_LOGIT_BIAS


def unpacked(vocab_size, rules):
    layout = RuleLayout(vocab_size)
    packed = pack_rules(layout, rules)
    assert packed.shape == (layout.size,)
    assert packed.dtype == np.int32
    return unpack_rules(layout, jnp.asarray(packed[None]))


def used(ids):
    ids = np.asarray(ids)[0]
    return ids[ids != NO_TOKEN].tolist()


def test_everything_comes_back():
    rules = RowRules(
        logit_bias={3: 1.5, 0: -100.0},
        allowed_token_ids=(0, 31, 32, 69),
        stop_token_ids=(7, 7, 2),
        bad_words_token_ids=((4,), (1, 2, 3), ()),
        logprob_token_ids=(9, 1),
    )
    device = unpacked(70, rules)
    assert used(device.bias_ids) == [3, 0]
    assert np.asarray(device.bias_values)[0, :3].tolist() == [1.5, -100.0, 0.0]
    words = np.asarray(device.allowed)[0].view(np.uint32)
    assert words.tolist() == [1 | 1 << 31, 1, 1 << 5]
    assert used(device.stop_ids) == [7, 2]
    assert used(device.bad_tokens) == [4, 1, 2, 3]
    assert np.asarray(device.bad_distances)[0, :5].tolist() == [0, 2, 1, 0, 0]
    assert np.asarray(device.bad_ends)[0, :4].tolist() == [0, 3, 3, 3]
    assert used(device.logprob_ids) == [9, 1]


@pytest.mark.parametrize("vocab_size", [1, 33, 512, 151936])
def test_neutral_rules_and_size(vocab_size):
    device = unpacked(vocab_size, RowRules())
    assert (np.asarray(device.allowed) == -1).all()
    for ids in (device.bias_ids, device.stop_ids, device.bad_tokens):
        assert used(ids) == []
    assert RuleLayout(vocab_size).size < vocab_size / 32 + 4500


def test_tables_hold_what_the_request_may_ask_for():
    bias = dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0)
    word = tuple(range(MAX_BAD_WORD_TOKENS))
    device = unpacked(2000, RowRules(logit_bias=bias, bad_words_token_ids=(word,)))
    assert len(used(device.bias_ids)) == MAX_LOGIT_BIAS
    assert np.asarray(device.bad_distances)[0, 0] == MAX_BAD_WORD_TOKENS - 1


@pytest.mark.parametrize(
    ("field", "rules"),
    [
        ("logit_bias", RowRules(logit_bias={100: 1.0})),
        ("allowed_token_ids", RowRules(allowed_token_ids=(-1,))),
        ("stop_token_ids", RowRules(stop_token_ids=(100,))),
        ("bad_words", RowRules(bad_words_token_ids=((1, 100),))),
        ("bad_words", RowRules(bad_words_token_ids=((1,) * 1025,))),
        ("logprob_token_ids", RowRules(logprob_token_ids=(2**40,))),
        ("logprob_token_ids", RowRules(logprob_token_ids=(1,) * 129)),
    ],
)
def test_bad_ids_are_refused_by_name(field, rules):
    with pytest.raises(InvalidRequestError, match=field) as error:
        pack_rules(RuleLayout(100), rules)
    assert error.value.parameter == field
