"""The gated delta rule and its step against float64 numpy."""

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.test_util import check_grads

from pallas_kernels.common.target import Target
from pallas_kernels.gated_delta_rule import DeltaInputs, gated_delta_rule
from pallas_kernels.gated_delta_rule.cases import (
    CASES,
    DeltaCase,
    call_rule,
    call_step,
    kernel_cases,
    make_arrays,
)
from tests.pallas_kernels.targets import gpu_target

TARGETS = {
    "reference": Target("cpu"),
    "gpu_triton": gpu_target(),
    "tpu": Target(
        "tpu", "v6e", "v6e", 1, interpret=pltpu.InterpretParams(detect_races=True)
    ),
}
TOLERANCE = {"float32": 3e-6, "bfloat16": 1.5e-2, "float16": 2e-3}
# Those outside of 0 ... 9 stand behind rows that they would meet if clamped.
STEP_ROWS = np.array([2, 0, -1, 9, 10], np.int32)
BY_NAME = {case.name: case for case in CASES}


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


def compare(found, expected, dtype):
    for name, one, other in zip(("out", "state"), found, expected, strict=True):
        error = np.abs(np.asarray(one, np.float64) - other).max()
        bound = TOLERANCE[dtype] * max(1, np.abs(other).max())
        assert error <= bound, f"{name}: {error} > {bound}"


def check_races(implementation):
    if implementation == "tpu":
        assert not interpret_pallas_call.races.races_found


def fitting(case, implementation):
    """The case in widths that a TPU's kernel takes."""
    if implementation != "tpu":
        return case
    return dataclasses.replace(case, key_width=128, width=128)


def check_rule(case, implementation, seed=0, change=None):
    arrays = make_arrays(fitting(case, implementation), seed)
    if change is not None:
        change(*arrays)
    options = {"implementation": implementation, "target": TARGETS[implementation]}
    found = jax.jit(partial(call_rule, **options))(*map(jnp.asarray, arrays))
    compare(found, solve(*arrays), case.dtype)
    check_races(implementation)


def check_step(case, implementation):
    """Tokens of some rows in any order; dead tokens hold NaN."""
    case = dataclasses.replace(case, num_new=(1,) * 10, padding=0)
    *inputs, _, state = make_arrays(fitting(case, implementation))
    dead = (STEP_ROWS < 0) | (STEP_ROWS >= 10)
    tokens = [array[:5].copy() for array in inputs]
    expected_out = np.zeros(tokens[2].shape, np.float64)
    expected_state = state.astype(np.float64)
    for token in np.flatnonzero(~dead):
        one = [array[token : token + 1] for array in tokens]
        row = STEP_ROWS[token]
        out, new = solve(*one, [0, 1], state[row : row + 1])
        expected_out[token], expected_state[row] = out[0], new[0]
    for array in tokens:
        array[dead] = np.nan
    options = {"implementation": implementation, "target": TARGETS[implementation]}
    arrays = (*tokens, STEP_ROWS, state)
    out, new = jax.jit(partial(call_step, **options))(*map(jnp.asarray, arrays))
    compare((out, new), (expected_out, expected_state), case.dtype)
    check_races(implementation)
    untouched = [row for row in range(10) if row not in STEP_ROWS]
    np.testing.assert_array_equal(np.asarray(new)[untouched], state[untouched])


@pytest.mark.parametrize("implementation", ["reference", "gpu_triton"])
@pytest.mark.parametrize("name", ["ragged", "bfloat16"])
def test_rule_equals_float64(name, implementation):
    check_rule(BY_NAME[name], implementation)


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", ["reference", "gpu_triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_equals_float64_in_full(case, implementation):
    check_rule(case, implementation)


def test_rule_equals_float64_on_a_tpu():
    case = DeltaCase("small", (0, 1, 66, 0, 3), num_heads=2, num_key_heads=1)
    check_rule(case, "tpu")


@pytest.mark.parametrize("implementation", ["reference", "gpu_triton", "tpu"])
def test_step_equals_float64(implementation):
    check_step(BY_NAME["ragged"], implementation)


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
    check_rule(case, "gpu_triton", change=change)


def test_strong_decay_does_not_overflow():
    def change(q, k, v, g, *_):
        g[:] = -30

    case = DeltaCase("forgetful", (100,), num_heads=1, num_key_heads=1)
    check_rule(case, "gpu_triton", change=change)


def check_boundaries(counts, num_tokens, seed):
    """One compiled program for all counts: the rest of the tokens is padding."""
    padding = num_tokens - sum(counts)
    case = DeltaCase("random", tuple(counts), 1, 1, padding=padding)
    check_rule(case, "gpu_triton", seed)


@settings(max_examples=5)
@given(
    counts=st.lists(
        st.sampled_from([0, 1, 2, 15, 16, 17, 31, 32, 33, 47, 48]),
        min_size=3,
        max_size=3,
    ),
    seed=st.integers(0, 1000),
)
def test_any_boundaries(counts, seed):
    check_boundaries(counts, 145, seed)


@pytest.mark.kernels
@settings(max_examples=100)
@given(
    counts=st.lists(st.integers(0, 140), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_any_boundaries_in_full(counts, seed):
    check_boundaries(counts, 570, seed)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_in_full_on_a_tpu(case, dtype):
    check_rule(dataclasses.replace(case, dtype=dtype), "tpu")


@pytest.mark.kernels
@pytest.mark.parametrize("change", [repeat_keys, turn_keys])
@pytest.mark.parametrize("implementation", ["gpu_triton", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_keys_in_full(dtype, implementation, change):
    case = DeltaCase("equal", (200,), num_heads=1, num_key_heads=1, dtype=dtype)
    check_rule(case, implementation, change=change)


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", ["reference", "gpu_triton", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["one_token", "ragged", "wide"])
def test_step_in_full(name, dtype, implementation):
    check_step(dataclasses.replace(BY_NAME[name], dtype=dtype), implementation)


@pytest.mark.parametrize(
    "implementation",
    [pytest.param("reference", marks=pytest.mark.kernels), "gpu_triton"],
)
def test_a_cut_anywhere_changes_nothing(implementation):
    """State handed from call to call, and a step in the end, equal one call."""
    case = DeltaCase("whole", (41,), padding=0, num_heads=2)
    *inputs, _, state = map(jnp.asarray, make_arrays(case))
    options = {"implementation": implementation, "target": TARGETS[implementation]}
    rule = jax.jit(partial(call_rule, **options))
    whole, final = rule(*inputs, jnp.array([0, 41]), state)
    parts, carried = [], state
    for first, last in ((0, 19), (19, 40)):
        # The tokens before are at the end, where they are padding.
        turned = [jnp.roll(array, -first, axis=0) for array in inputs]
        out, carried = rule(*turned, jnp.array([0, last - first]), carried)
        parts.append(out[: last - first])
    cut = [array[40:] for array in inputs]
    out, carried = call_step(*cut, jnp.array([0]), carried, **options)
    np.testing.assert_allclose(jnp.concatenate([*parts, out]), whole, atol=1e-5)
    np.testing.assert_allclose(carried, final, atol=1e-5)


def test_reference_has_gradients():
    case = DeltaCase("small", (3, 0, 2), 2, 1, key_width=3, width=2, padding=1)
    *inputs, starts, state = map(jnp.asarray, make_arrays(case))

    @jax.jit
    def total(*arrays):
        out, final = call_rule(
            *arrays[:5], starts, arrays[5], implementation="reference"
        )
        return jnp.sum(out * out) + jnp.sum(jnp.sin(final))

    check_grads(total, (*inputs, state), 1, ["rev"], atol=2e-2, rtol=2e-2)


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
    target = TARGETS[implementation]
    with pytest.raises(NotImplementedError, match=word):
        call_rule(*arrays, implementation=implementation, target=target)


def test_real_cases_are_distinct():
    names = [(case.operation, case.name) for case in kernel_cases()]
    assert len(set(names)) == len(names)
    for case in kernel_cases():
        assert case.num_bytes > 0
        assert case.num_flops > 0
