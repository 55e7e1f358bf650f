"""The gated delta rule and its step against float64 numpy."""

import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.gated_delta_rule import DeltaInputs, gated_delta_rule
from pallas_kernels.gated_delta_rule.cases import (
    CASES,
    DeltaCase,
    call_rule,
    call_step,
    kernel_cases,
    make_arrays,
)
from tests.pallas_kernels.recurrent import (
    ALL_COUNTS,
    ALL_TOKENS,
    QUICK_COUNTS,
    QUICK_TOKENS,
    Layer,
    assert_distinct,
    choice,
)

BY_NAME = {case.name: case for case in CASES}
RANDOM = DeltaCase("random", (), num_heads=1, num_key_heads=1)


def solve(q, k, v, g, beta, row_starts, state, normalise=True):
    """Token by token in float64; padding gives zeros."""
    q, k, v, g, beta, state = (
        np.asarray(array, np.float64) for array in (q, k, v, g, beta, state)
    )
    if normalise:
        q, k = (a / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
    group = v.shape[1] // k.shape[1]
    out, state = np.zeros_like(v), state.copy()
    for row in range(len(row_starts) - 1):
        for token in range(row_starts[row], row_starts[row + 1]):
            for head in range(v.shape[1]):
                key, query = k[token, head // group], q[token, head // group]
                decayed = np.exp(g[token, head]) * state[row, head]
                wrong = v[token, head] - decayed.T @ key
                new = decayed + beta[token, head] * np.outer(key, wrong)
                state[row, head] = new
                out[token, head] = new.T @ query * len(query) ** -0.5
    return out, state


LAYER = Layer(
    scan=call_rule,
    step=call_step,
    make_arrays=make_arrays,
    solve=solve,
    num_inputs=5,
    values=2,
    fit_tpu=lambda case: dataclasses.replace(case, key_width=128, width=128),
    tolerance={"float32": 3e-6, "bfloat16": 1.5e-2, "float16": 2e-3},
)


@pytest.mark.parametrize("implementation", ["reference", "gpu_triton"])
@pytest.mark.parametrize("name", ["ragged", "bfloat16"])
def test_rule_equals_float64(name, implementation):
    LAYER.check_scan(BY_NAME[name], implementation)


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", ["reference", "gpu_triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_float64_in_full(case, implementation):
    LAYER.check_scan(case, implementation)


def test_rule_equals_float64_on_a_tpu():
    case = DeltaCase("small", (0, 1, 66, 0, 3), num_heads=2, num_key_heads=1)
    LAYER.check_scan(case, "tpu")


@pytest.mark.parametrize("implementation", ["reference", "gpu_triton", "tpu"])
def test_step_equals_float64(implementation):
    LAYER.check_step(BY_NAME["ragged"], implementation)


def repeat_keys(q, k, v, g, beta, *_):
    """One key again and again, each time replaced wholly: a text that repeats."""
    k[:] = k[:1]
    g[:], beta[:] = 0, 1


def turn_keys(q, k, v, g, beta, *_):
    """Keys of alternating sign: the terms of a power series would all be positive."""
    k[:] = k[:1]
    k[1::2] *= -1
    g[:], beta[:] = 0, 1


@pytest.mark.parametrize("change", [repeat_keys, turn_keys])
def test_equal_keys_lose_no_precision(change):
    case = DeltaCase("equal", (100,), num_heads=1, num_key_heads=1)
    LAYER.check_scan(case, "gpu_triton", change=change)


def test_strong_decay_does_not_overflow():
    def change(q, k, v, g, *_):
        g[:] = -30

    case = DeltaCase("forgetful", (100,), num_heads=1, num_key_heads=1)
    LAYER.check_scan(case, "gpu_triton", change=change)


@settings(max_examples=5)
@given(counts=QUICK_COUNTS, seed=st.integers(0, 1000))
def test_any_boundaries(counts, seed):
    LAYER.check_boundaries(RANDOM, counts, QUICK_TOKENS, seed)


@pytest.mark.kernels
@settings(max_examples=100)
@given(counts=ALL_COUNTS, seed=st.integers(0, 1000))
def test_any_boundaries_in_full(counts, seed):
    LAYER.check_boundaries(RANDOM, counts, ALL_TOKENS, seed)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_in_full_on_a_tpu(case, dtype):
    LAYER.check_scan(dataclasses.replace(case, dtype=dtype), "tpu")


@pytest.mark.kernels
@pytest.mark.parametrize("change", [repeat_keys, turn_keys])
@pytest.mark.parametrize("implementation", ["gpu_triton", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_keys_in_full(dtype, implementation, change):
    case = DeltaCase("equal", (200,), num_heads=1, num_key_heads=1, dtype=dtype)
    LAYER.check_scan(case, implementation, change=change)


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", ["reference", "gpu_triton", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["one_token", "ragged", "wide"])
def test_step_in_full(name, dtype, implementation):
    LAYER.check_step(dataclasses.replace(BY_NAME[name], dtype=dtype), implementation)


@pytest.mark.parametrize(
    "implementation",
    [pytest.param("reference", marks=pytest.mark.kernels), "gpu_triton"],
)
def test_a_cut_anywhere_changes_nothing(implementation):
    LAYER.check_cut(DeltaCase("whole", (), num_heads=2), implementation)


def test_reference_has_gradients():
    case = DeltaCase("small", (3, 0, 2), 2, 1, key_width=3, width=2, padding=1)
    LAYER.check_gradients(case, tolerance=2e-2)


def test_options_are_applied():
    """Keys as they are, and a scale."""
    *inputs, starts, state = make_arrays(DeltaCase("small", (4,)))
    inputs[1] *= 0.1
    out, _ = gated_delta_rule(
        DeltaInputs(*map(jnp.asarray, inputs)),
        jnp.asarray(state),
        jnp.asarray(starts),
        scale=0.5,
        implementation="reference",
    )
    expected, _ = solve(*inputs, starts, state, normalise=False)
    np.testing.assert_allclose(out, expected * 32**0.5 * 0.5, atol=2e-5)


@pytest.mark.parametrize(
    ("index", "shape", "word"),
    [
        (0, (7, 3, 32), "do not fit"),
        (2, (7, 3, 32), "no multiple"),
        (3, (7, 3), "g has shape"),
        (4, (6, 4), "beta has shape"),
        (6, (1, 4, 32, 8), "state is"),
        (6, (2, 4, 32, 32), "2 rows"),
    ],
)
def test_wrong_shapes_are_named(index, shape, word):
    arrays = [jnp.asarray(a) for a in make_arrays(DeltaCase("small", (4,)))]
    arrays[index] = jnp.zeros(shape)
    with pytest.raises(ValueError, match=word):
        inspect.unwrap(gated_delta_rule)(DeltaInputs(*arrays[:5]), arrays[6], arrays[5])


@pytest.mark.parametrize(
    ("implementation", "changes", "word"),
    [
        ("gpu_triton", {"key_width": 24}, "Dk=24"),
        ("gpu_triton", {"width": 8}, "Dv=8"),
        ("tpu", {"dtype": "float16"}, "float16"),
        ("tpu", {"key_width": 24}, "lanes"),
    ],
)
def test_what_is_not_supported_says_why(implementation, changes, word):
    case = dataclasses.replace(DeltaCase("small", (4,)), **changes)
    arrays = map(jnp.asarray, make_arrays(case))
    with pytest.raises(NotImplementedError, match=word):
        call_rule(*arrays, **choice(implementation))


def test_real_cases_are_distinct():
    assert_distinct(kernel_cases())
