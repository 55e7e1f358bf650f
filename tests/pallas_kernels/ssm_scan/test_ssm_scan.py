"""The scan and the step of Mamba-2 against float64 numpy."""

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
from pallas_kernels.ssm_scan import SsmInputs, SsmParameters, ssm_scan
from pallas_kernels.ssm_scan.cases import (
    CASES,
    SsmCase,
    call_scan,
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
TOLERANCE = {"float32": 5e-6, "bfloat16": 1.5e-2, "float16": 2e-3}
# Those outside of 0 ... 9 stand behind rows that they would meet if clamped.
STEP_ROWS = np.array([2, 0, -1, 9, 10], np.int32)
BY_NAME = {case.name: case for case in CASES}


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


def compare(found, expected, dtype):
    for name, one, other in zip(("y", "state"), found, expected, strict=True):
        error = np.abs(np.asarray(one, np.float64) - other).max()
        bound = TOLERANCE[dtype] * max(1, np.abs(other).max())
        assert error <= bound, f"{name}: {error} > {bound}"


def check_races(implementation):
    if implementation == "tpu":
        assert not interpret_pallas_call.races.races_found


def fitting(case, implementation):
    """The case in the widths and types that a TPU's kernel takes."""
    if implementation != "tpu":
        return case
    groups = case.num_groups
    width = 128 if groups > 1 else case.state_width
    heads = max(case.num_heads, groups * 128 // case.width)
    return dataclasses.replace(case, num_heads=heads, state_width=width)


def check_scan(case, implementation, seed=0):
    arrays = make_arrays(fitting(case, implementation), seed)
    options = {"implementation": implementation, "target": TARGETS[implementation]}
    found = jax.jit(partial(call_scan, **options))(*map(jnp.asarray, arrays))
    compare(found, solve(*arrays), case.dtype)
    check_races(implementation)


def check_step(case, implementation):
    """Tokens of some rows in any order; dead tokens hold NaN."""
    case = dataclasses.replace(case, num_new=(1,) * 10, padding=0)
    *inputs, _, state = make_arrays(fitting(case, implementation))
    dead = (STEP_ROWS < 0) | (STEP_ROWS >= 10)
    tokens = [array[:5].copy() for array in inputs[:4]]
    order = [i for i in range(5) if not dead[i]]
    expected_y = np.zeros(tokens[0].shape, np.float64)
    expected_state = state.astype(np.float64)
    for token in order:
        one = [array[token : token + 1] for array in tokens]
        row = STEP_ROWS[token]
        y, new = solve(*one, *inputs[4:], [0, 1], state[row : row + 1])
        expected_y[token], expected_state[row] = y[0], new[0]
    for array in tokens:
        array[dead] = np.nan
    options = {"implementation": implementation, "target": TARGETS[implementation]}
    arrays = (*tokens, *inputs[4:], STEP_ROWS, state)
    y, new = jax.jit(partial(call_step, **options))(*map(jnp.asarray, arrays))
    compare((y, new), (expected_y, expected_state), case.dtype)
    check_races(implementation)
    untouched = [row for row in range(10) if row not in STEP_ROWS]
    np.testing.assert_array_equal(np.asarray(new)[untouched], state[untouched])


@pytest.mark.parametrize("implementation", ["reference", "gpu_triton"])
@pytest.mark.parametrize("name", ["ragged", "bfloat16"])
def test_scan_equals_float64(name, implementation):
    check_scan(BY_NAME[name], implementation)


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", ["reference", "gpu_triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scan_equals_float64_in_full(case, implementation):
    check_scan(case, implementation)


def test_scan_equals_float64_on_a_tpu():
    check_scan(SsmCase("small", (0, 1, 130, 0, 3)), "tpu")


@pytest.mark.parametrize("implementation", ["reference", "gpu_triton", "tpu"])
def test_step_equals_float64(implementation):
    check_step(BY_NAME["ragged"], implementation)


def check_boundaries(counts, num_tokens, seed):
    """One compiled program for all counts: the rest of the tokens is padding."""
    padding = num_tokens - sum(counts)
    case = SsmCase("random", tuple(counts), padding=padding, num_heads=1)
    check_scan(case, "gpu_triton", seed)


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
def test_scan_in_full_on_a_tpu(case, dtype):
    check_scan(dataclasses.replace(case, dtype=dtype), "tpu")


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
    case = SsmCase("whole", (41,), padding=0, num_heads=2)
    *inputs, _, state = map(jnp.asarray, make_arrays(case))
    options = {"implementation": implementation, "target": TARGETS[implementation]}
    scan = jax.jit(partial(call_scan, **options))
    whole, final = scan(*inputs, jnp.array([0, 41]), state)
    parts, carried = [], state
    for first, last in ((0, 19), (19, 40)):
        # The tokens before are at the end, where they are padding.
        turned = [jnp.roll(array, -first, axis=0) for array in inputs[:4]]
        starts = jnp.array([0, last - first])
        y, carried = scan(*turned, *inputs[4:], starts, carried)
        parts.append(y[: last - first])
    cut = [array[40:] for array in inputs[:4]]
    y, carried = call_step(*cut, *inputs[4:], jnp.array([0]), carried, **options)
    np.testing.assert_allclose(jnp.concatenate([*parts, y]), whole, atol=2e-5)
    np.testing.assert_allclose(carried, final, atol=2e-5)


def test_reference_has_gradients():
    case = SsmCase("small", (3, 0, 2), num_heads=2, width=2, state_width=3, padding=1)
    *inputs, starts, state = map(jnp.asarray, make_arrays(case))

    @jax.jit
    def total(*arrays):
        y, final = call_scan(*arrays[:7], starts, arrays[7], implementation="reference")
        return jnp.sum(y * y) + jnp.sum(jnp.sin(final))

    check_grads(total, (*inputs, state), 1, ["rev"], atol=3e-2, rtol=3e-2)


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
    target = TARGETS[implementation]
    with pytest.raises(NotImplementedError, match=word):
        call_scan(*arrays, implementation=implementation, target=target)


def test_real_cases_are_distinct():
    names = [(case.operation, case.name) for case in kernel_cases()]
    assert len(set(names)) == len(names)
    for case in kernel_cases():
        assert case.num_bytes > 0
        assert case.num_flops > 0
