"""The scan and the step of Mamba-2 against float64 numpy."""

import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.ssm_scan import SsmInputs, SsmParameters, ssm_scan
from pallas_kernels.ssm_scan.cases import (
    CASES,
    SsmCase,
    call_scan,
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
RANDOM = SsmCase("random", (), num_heads=1)


def solve(x, dt, b, c, a, d, bias, row_starts, state):
    """Token by token in float64; padding gives zeros."""
    x, dt, b, c, a, d, bias, state = (
        np.asarray(v, np.float64) for v in (x, dt, b, c, a, d, bias, state)
    )
    heads_per_group = x.shape[1] // b.shape[1]
    y, state = np.zeros_like(x), state.copy()
    for row in range(len(row_starts) - 1):
        for token in range(row_starts[row], row_starts[row + 1]):
            for head in range(x.shape[1]):
                step = np.logaddexp(0, dt[token, head] + bias[head])
                group = head // heads_per_group
                added = step * np.outer(x[token, head], b[token, group])
                state[row, head] = np.exp(step * a[head]) * state[row, head] + added
                skipped = d[head] * x[token, head]
                y[token, head] = state[row, head] @ c[token, group] + skipped
    return y, state


def fit_tpu(case):
    """The case in the widths that a TPU's kernel takes."""
    groups = case.num_groups
    width = 128 if groups > 1 else case.state_width
    heads = max(case.num_heads, groups * 128 // case.width)
    return dataclasses.replace(case, num_heads=heads, state_width=width)


LAYER = Layer(
    scan=call_scan,
    step=call_step,
    make_arrays=make_arrays,
    solve=solve,
    num_inputs=4,
    values=0,
    fit_tpu=fit_tpu,
    tolerance={"float32": 5e-6, "bfloat16": 1.5e-2, "float16": 2e-3},
)


@pytest.mark.parametrize("implementation", ["reference", "gpu_triton"])
@pytest.mark.parametrize("name", ["ragged", "bfloat16"])
def test_scan_equals_float64(name, implementation):
    LAYER.check_scan(BY_NAME[name], implementation)


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", ["reference", "gpu_triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scan_equals_float64_in_full(case, implementation):
    LAYER.check_scan(case, implementation)


def test_scan_equals_float64_on_a_tpu():
    LAYER.check_scan(SsmCase("small", (0, 1, 130, 0, 3)), "tpu")


@pytest.mark.parametrize("implementation", ["reference", "gpu_triton", "tpu"])
def test_step_equals_float64(implementation):
    LAYER.check_step(BY_NAME["ragged"], implementation)


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
def test_scan_in_full_on_a_tpu(case, dtype):
    LAYER.check_scan(dataclasses.replace(case, dtype=dtype), "tpu")


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
    LAYER.check_cut(SsmCase("whole", (), num_heads=2), implementation)


def test_reference_has_gradients():
    case = SsmCase("small", (3, 0, 2), num_heads=2, width=2, state_width=3, padding=1)
    LAYER.check_gradients(case, tolerance=3e-2)


def test_options_are_applied():
    """No softplus, bias or skip."""
    *inputs, starts, state = map(jnp.asarray, make_arrays(SsmCase("small", (4,))))
    x, dt, b, c, a = inputs[:5]
    dt = jnp.abs(dt)
    y, _ = ssm_scan(
        SsmInputs(x, dt, b, c),
        SsmParameters(a, softplus=False),
        state,
        starts,
        implementation="reference",
    )
    zeros = np.zeros(a.shape)
    raw = np.log(np.expm1(np.asarray(dt, np.float64)))
    expected, _ = solve(x, raw, b, c, a, zeros, zeros, np.asarray(starts), state)
    np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("index", "shape", "word"),
    [
        (1, (7, 3), "dt has shape"),
        (2, (7, 3, 16), "do not fit"),
        (4, (3,), "A has shape"),
        (8, (1, 4, 32, 8), "state is"),
        (8, (2, 4, 32, 16), "2 rows"),
    ],
)
def test_wrong_shapes_are_named(index, shape, word):
    arrays = [jnp.asarray(a) for a in make_arrays(SsmCase("small", (4,)))]
    arrays[index] = jnp.zeros(shape)
    inputs, parameters = SsmInputs(*arrays[:4]), SsmParameters(arrays[4])
    with pytest.raises(ValueError, match=word):
        inspect.unwrap(ssm_scan)(inputs, parameters, arrays[8], arrays[7])


@pytest.mark.parametrize(
    ("implementation", "changes", "word"),
    [
        ("gpu_triton", {"width": 24}, "P=24"),
        ("gpu_triton", {"state_width": 8}, "N=8"),
        ("tpu", {"dtype": "float16"}, "float16"),
        ("tpu", {"width": 24, "num_heads": 2}, "lanes"),
        ("tpu", {"num_groups": 2}, "groups"),
    ],
)
def test_what_is_not_supported_says_why(implementation, changes, word):
    case = dataclasses.replace(SsmCase("small", (4,)), **changes)
    arrays = map(jnp.asarray, make_arrays(case))
    with pytest.raises(NotImplementedError, match=word):
        call_scan(*arrays, **choice(implementation))


def test_real_cases_are_distinct():
    assert_distinct(kernel_cases())
