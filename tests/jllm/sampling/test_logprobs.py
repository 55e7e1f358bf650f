"""Log-probabilities, ranks and the packed result."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jllm.sampling.logprobs import FINITE, ResultLayout, pack_result, prompt_logprobs
from tests.jllm.sampling import oracle

SCORES = st.floats(-20, 20, width=32, allow_subnormal=False).map(lambda x: x + 0.0)
pack_jit = jax.jit(pack_result, static_argnums=3)


def check_row(entry, logits, token, top):
    exact = oracle.log_softmax(logits)
    order = np.argsort(-logits, kind="stable")[:top]
    assert entry["token"] == token
    assert entry["rank"] == 1 + (logits > logits[token]).sum()
    np.testing.assert_allclose(entry["logprob"], exact[token], atol=1e-5)
    np.testing.assert_array_equal(entry["top_ids"], order)
    np.testing.assert_allclose(entry["top_logprobs"], exact[order], atol=1e-5)


@pytest.mark.parametrize(("vocab_size", "top"), [(1, 1), (9, 9), (600, 5), (600, 0)])
def test_pack_and_unpack(vocab_size, top):
    elements = SCORES | st.just(3.0)
    logits_of = hnp.arrays(
        np.float32, (2, vocab_size), elements=elements, fill=elements
    )

    @given(logits_of, st.integers(0, vocab_size - 1))
    def check(logits, token):
        requested = np.full((2, 128), 2**31 - 1, np.int32)
        requested[0, :2] = [token, 0]
        tokens = jnp.asarray([token, 0], jnp.int32)
        packed = pack_jit(jnp.asarray(logits), tokens, jnp.asarray(requested), top)
        layout = ResultLayout(top)
        assert packed.shape == (2, layout.size)
        entry = layout.unpack(np.asarray(packed)[0])
        check_row(entry, logits[0], token, top)
        assert entry["flags"] & FINITE
        exact = oracle.log_softmax(logits[0])
        np.testing.assert_allclose(entry["requested"][:2], exact[[token, 0]], atol=1e-5)
        assert (entry["requested"][2:] == -np.inf).all()

    check()


def test_unpack_takes_any_number_of_rows():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9)), jnp.float32)
    packed = np.asarray(pack_jit(logits, jnp.asarray([1, 2, 3]), None, 4))
    layout = ResultLayout(4)
    together = layout.unpack(packed)
    for row in range(3):
        for name, value in layout.unpack(packed[row]).items():
            np.testing.assert_array_equal(together[name][row], value)


def test_padded_ids_do_not_count():
    logits = np.array([[1.0, 2.0, 0.0, -np.inf]], np.float32)
    packed = pack_jit(jnp.asarray(logits), jnp.asarray([1]), None, 3)
    entry = ResultLayout(3).unpack(np.asarray(packed)[0])
    check_row(entry, logits[0], 1, 3)
    assert entry["flags"] == FINITE


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_flagged(value):
    logits = np.zeros((2, 5), np.float32)
    logits[1, 3] = value
    packed = pack_jit(jnp.asarray(logits), jnp.asarray([0, 0]), None, 1)
    flags = ResultLayout(1).unpack(np.asarray(packed))["flags"]
    assert (flags & FINITE).tolist() == [1, 0]


@pytest.mark.parametrize("num_tokens", [1, 4, 11])
def test_prompt_logprobs(num_tokens):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(num_tokens, 6)).astype(np.float32)
    head = rng.normal(size=(6, 40)).astype(np.float32)
    targets = rng.integers(0, 40, num_tokens)
    seen = []

    def logits_fn(some):
        seen.append(some.shape[0])
        return some @ jnp.asarray(head)

    packed = prompt_logprobs(
        jnp.asarray(hidden), jnp.asarray(targets, jnp.int32), logits_fn, 3, chunk=4
    )
    assert packed.shape == (num_tokens, ResultLayout(3).size)
    assert max(seen) == 4
    logits = np.asarray(jnp.asarray(hidden) @ jnp.asarray(head))
    for row in range(num_tokens):
        entry = ResultLayout(3).unpack(np.asarray(packed)[row])
        check_row(entry, logits[row], targets[row], 3)


def test_prompt_logprobs_never_hold_all_logits():
    num_tokens, vocab_size = 1024, 4096
    score = partial(prompt_logprobs, num_logprobs=5)
    head = jax.ShapeDtypeStruct((8, vocab_size), jnp.float32)
    hidden = jax.ShapeDtypeStruct((num_tokens, 8), jnp.float32)
    targets = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    step = jax.jit(lambda w, h, t: score(h, t, lambda some: some @ w))
    memory = step.lower(head, hidden, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < num_tokens * vocab_size * 4 / 2
