"""Grouped products against float64 numpy, on every backend."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.dispatch import collect_fallbacks
from pallas_kernels.common.target import Target
from pallas_kernels.grouped_matmul import gpu_triton, grouped_matmul
from pallas_kernels.grouped_matmul.cases import (
    CASES,
    GroupedCase,
    array_shapes,
    case_function,
    kernel_cases,
    make_arrays,
)
from pallas_kernels.grouped_matmul.tiles import TileTable, tile_table
from tests.pallas_kernels.targets import gpu_target

TARGETS = {
    "reference": Target("cpu"),
    "blocked": Target("cpu"),
    "gpu_triton": gpu_target(),
    "tpu": Target(
        "tpu", "v6e", "v6e", 1, pltpu.InterpretParams(uninitialized_memory="nan")
    ),
}
# The others run with the full matrices.
QUICK = {"gpu_triton": {"ragged", "int8"}, "tpu": {"ragged", "int8"}}
# Rounding of the result.
TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 2e-3}


def solve(case, arrays):
    """The products in float64, one group after the other, and their magnitude."""
    x, weights = (arrays[name].astype(np.float64) for name in ("x", "weights"))
    if "scales" in arrays:
        weights = weights * arrays["scales"].astype(np.float64)[:, :, None]
    out = np.zeros((2, case.rows, case.channels))
    start = 0
    for group, size in enumerate(case.sizes):
        rows = x[start : start + size]
        if size:
            out[0, start : start + size] = rows @ weights[group].T
            out[1, start : start + size] = np.abs(rows) @ np.abs(weights[group]).T
        start += size
    return out


def check(case, implementation, seed=0):
    arrays = make_arrays(case, np.random.default_rng(seed))
    expected, magnitude = solve(case, arrays)
    target = TARGETS[implementation]
    function = case_function(case)
    out = jax.jit(
        lambda *values: function(*values, implementation=implementation, target=target)
    )(*arrays.values())
    dtype = case.out_dtype or case.dtype
    assert out.dtype == jnp.dtype(dtype)
    error = np.abs(np.asarray(out, np.float64) - expected)
    bound = TOLERANCE[dtype] * np.abs(expected) + 1e-6 * magnitude
    assert np.all(error <= bound), np.nanmax(error - bound)


def implementations_and_cases():
    for implementation in TARGETS:
        for case in CASES:
            quick = case.name in QUICK.get(implementation, {case.name})
            marks = () if quick else pytest.mark.kernels
            name = f"{implementation}-{case.name}"
            yield pytest.param(implementation, case, id=name, marks=marks)


@pytest.mark.parametrize(("implementation", "case"), list(implementations_and_cases()))
def test_product_is_right(implementation, case):
    check(case, implementation)


def test_programs_of_a_gpu_may_run_in_any_order(monkeypatch):
    """Each writes rows of its own: the last tile first gives the same result."""

    def backwards(*arguments, **options):
        *parts, num_live = tile_table(*arguments, **options)
        return TileTable(*(part[::-1] for part in parts), num_live)

    monkeypatch.setattr(gpu_triton, "tile_table", backwards)
    (case,) = [case for case in CASES if case.name == "ragged"]
    check(case, "gpu_triton")


TYPES = (
    ("bfloat16", ""),
    ("bfloat16", "int8"),
    ("bfloat16", "float8_e4m3fn"),
    ("bfloat16", "float8_e5m2"),
    ("float32", ""),
    ("float32", "int8"),
)


SIZES_OF_GROUPS = st.sampled_from([0, 0, 1, 2, 15, 16, 17, 63, 64, 65, 129])


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", TARGETS)
@hypothesis.settings(max_examples=20)
@hypothesis.given(
    sizes=st.lists(SIZES_OF_GROUPS, min_size=1, max_size=9),
    padding=st.integers(0, 70),
    channels=st.sampled_from([8, 64, 96, 136, 264]),
    units=st.integers(1, 5),
    types=st.sampled_from(TYPES),
    out_dtype=st.sampled_from(["", "float32", "bfloat16"]),
)
def test_random_products_are_right(
    implementation, sizes, padding, channels, units, types, out_dtype
):
    padding = padding if sum(sizes) else padding + 1
    case = GroupedCase(
        "random", tuple(sizes), padding, channels, 128 * units, *types, out_dtype
    )
    check(case, implementation)


@pytest.mark.kernels
@pytest.mark.parametrize("weight", ["", "int8", "float8_e5m2"])
def test_float16_on_gpu(weight):
    check(GroupedCase("half", (3, 0, 20), 2, 72, 192, "float16", weight), "gpu_triton")


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", ["gpu_triton", "tpu"])
def test_inputs_that_no_tile_divides(implementation):
    check(GroupedCase("odd", (3, 0, 20), 2, 40, 100, weight="int8"), implementation)


compiled_table = jax.jit(tile_table, static_argnums=(1, 2), static_argnames="aligned")


@pytest.mark.parametrize("aligned", [False, True])
@hypothesis.settings(max_examples=100)
@hypothesis.given(
    ends=st.lists(st.integers(0, 40), min_size=5, max_size=5),
    tile=st.sampled_from([1, 4, 16]),
)
def test_tiles_cover_each_row_once(aligned, ends, tile):
    num_rows = 40
    sizes = np.diff(np.sort(ends), prepend=0)
    padding = num_rows - sizes.sum()
    table = compiled_table(np.int32(sizes), num_rows, tile, aligned=aligned)
    groups, starts, ends = (np.asarray(part) for part in table[:3])
    expected = np.repeat(np.arange(len(sizes) + 1), [*sizes, padding])
    found = np.full(num_rows, -1)
    for group, start, end in zip(groups, starts, ends, strict=True):
        assert end - start <= tile
        if aligned and end > start:
            assert start // tile == (end - 1) // tile
        assert np.all(found[start:end] == -1)
        found[start:end] = group
    np.testing.assert_array_equal(found, expected)
    live = ends > starts
    assert live.sum() == table.num_live
    # The live ones come first; the others ask for nothing that is not there already.
    assert np.all(live[: live.sum()])
    assert np.all(groups[live.sum() :] == groups[live.sum() - 1])


def test_sizes_are_known_only_when_it_runs():
    case = CASES[0]
    arrays = make_arrays(case, np.random.default_rng(0))
    call = jax.jit(lambda *a: case_function(case)(*a, target=Target("cpu")))
    for sizes in [(8, 8, 8, 8), (0, 0, 0, 32), (1, 0, 30, 1), (0, 0, 0, 0)]:
        padding = 32 - sum(sizes)
        now = dict(arrays, group_sizes=np.array(sizes, np.int32))
        expected, magnitude = solve(
            dataclasses.replace(case, sizes=sizes, padding=padding), now
        )
        error = np.abs(np.asarray(call(*now.values()), np.float64) - expected)
        assert np.all(error <= 8e-3 * np.abs(expected) + 1e-6 * magnitude)
    assert call._cache_size() == 1


def test_reference_has_gradients():
    case = GroupedCase("gradient", (3, 0, 4), 2, 8, 16, "float32")
    arrays = make_arrays(case, np.random.default_rng(0))
    x = jnp.asarray(np.nan_to_num(arrays["x"]))
    weights = jnp.asarray(np.nan_to_num(arrays["weights"]))
    sizes = jnp.asarray(arrays["group_sizes"])
    to_x, to_weights = jax.grad(
        lambda x, weights: jnp.sum(
            grouped_matmul(
                x,
                weights,
                sizes,
                implementation="reference",
                target=Target("cpu"),
            )
        ),
        argnums=(0, 1),
    )(x, weights)
    start = 0
    for group, size in enumerate(case.sizes):
        rows = slice(start, start + size)
        expected = np.broadcast_to(weights[group].sum(0), (size, case.inputs))
        np.testing.assert_allclose(to_x[rows], expected, atol=1e-5)
        expected = np.broadcast_to(x[rows].sum(0), weights[group].shape)
        np.testing.assert_allclose(to_weights[group], expected, atol=1e-5)
        start += size
    np.testing.assert_array_equal(to_x[start:], 0)


@pytest.fixture
def without_shape_checks():
    """As outside of tests, where signatures are not checked before arguments."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


X, W, SIZES = jnp.zeros((4, 8)), jnp.zeros((2, 6, 8)), jnp.zeros(2, jnp.int32)
W_INT8 = W.astype("int8")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X.astype("int8"), W, SIZES), {}, "x of int8 must be"),
        ((X, W, SIZES), {"out_dtype": "int8"}, "out_dtype of int8 must be"),
        ((X[:, :7], W, SIZES), {}, "weights have 8 inputs, x has 7"),
        ((X, W, SIZES[:1]), {}, r"group_sizes has shape \(1,\), expected \(2,\)"),
        ((X, W_INT8, SIZES), {}, "scales must be given for weights of int8"),
        ((X, W_INT8, SIZES), {"scales": jnp.ones((2, 5))}, "scales has shape"),
        ((X, W.astype("bfloat16"), SIZES), {}, "bfloat16 must be of float32"),
        ((X, W, SIZES), {"scales": jnp.ones((2, 6))}, "scales must be None"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(*arguments, target=Target("cpu"), **options)


@pytest.mark.parametrize(
    ("target", "x", "weights", "reason"),
    [
        (Target("gpu", "sm_75", "t4", 40), X, W, "sm_75"),
        (Target("gpu", "sm_80", "a100", 108), X, W.astype("float8_e5m2"), "float8"),
        (Target("gpu", "gfx942", "mi300x", 304), X, W.astype("float8_e5m2"), "float8"),
        (TARGETS["gpu_triton"], X[:0], W, "empty"),
        (TARGETS["tpu"], X[:0], W, "empty"),
        (TARGETS["tpu"], X.astype("float16"), W.astype("float16"), "float16"),
    ],
)
def test_what_a_kernel_cannot_do_falls_back_with_a_reason(target, x, weights, reason):
    scales = jnp.ones((2, 6)) if weights.dtype.itemsize == 1 else None
    with collect_fallbacks() as found:
        out = grouped_matmul(x, weights, SIZES, scales=scales, target=target)
    assert out.shape == (len(x), 6)
    assert reason in found[0].reason
    with pytest.raises(NotImplementedError, match=reason):
        grouped_matmul(
            x,
            weights,
            SIZES,
            scales=scales,
            target=target,
            implementation=found[0].wanted,
        )


def test_kernel_cases_say_what_they_need():
    cases = kernel_cases()
    assert len({case.name for case in cases}) == len(cases)
    (case,) = [case for case in cases if case.name == "qwen3_down-1-bfloat16-int8"]
    # Eight experts of 128: int8 weights and scales, x and the result.
    rows = 8 * (768 + 2048) * 2 + 128 * 4
    assert case.num_bytes == 8 * 2048 * (768 + 4) + rows
    assert case.num_flops == 2 * 8 * 2048 * 768
    for name, (shape, dtype) in array_shapes(CASES[6]).items():
        array = make_arrays(CASES[6], np.random.default_rng(0))[name]
        assert (array.shape, array.dtype.name) == (shape, dtype)
