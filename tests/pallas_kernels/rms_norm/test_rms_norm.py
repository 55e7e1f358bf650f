"""Normalisations of every implementation against float64 numpy."""

import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.target import Target
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rms_norm.cases import CASES, VARIANTS, kernel_cases
from tests.pallas_kernels.targets import gpu_target

TARGETS = {
    "reference": Target("cpu"),
    "gpu_triton": gpu_target(),
    "tpu": Target("tpu", "v6e", "v6e", 1, interpret=pltpu.InterpretParams()),
}
ULP = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-10}
LARGEST = {"int8": 127, "float8_e4m3fn": 448}


def solve(x, weight, residual, epsilon, offset):
    total = x if residual is None else x + residual
    root = np.sqrt((total**2).mean(axis=1, keepdims=True) + epsilon)
    return total / root * (weight + offset)


def check(num_tokens, width, dtype, implementation, variant):
    if implementation == "tpu" and dtype == "float16":
        pytest.skip("no float16 on TPU")
    rng = np.random.default_rng(num_tokens + width)
    variant = dict(variant)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    x, weight = draw(num_tokens, width), draw(width)
    residual = draw(num_tokens, width) if variant.pop("has_residual", False) else None
    if num_tokens > 2:
        x = x.at[1].set(0)
        residual = None if residual is None else residual.at[1].set(0)
    call = lambda x, w, r: rms_norm(  # noqa: E731
        x,
        w,
        1e-5,
        residual=r,
        implementation=implementation,
        target=TARGETS[implementation],
        **variant,
    )
    result = jax.jit(call)(x, weight, residual)
    wide = [
        None if a is None else np.asarray(a, np.float64) for a in (x, weight, residual)
    ]
    expected = solve(*wide, 1e-5, variant.get("weight_offset", 0))
    assert (result.residual is None) == (residual is None)
    if residual is not None:
        assert result.residual.dtype == x.dtype
        np.testing.assert_array_equal(result.residual, x + residual)
    out = np.asarray(result.out, np.float64)
    bound = 4 * ULP[dtype] * np.abs(expected) + 1e-6
    if (quantize := variant.get("quantize")) is None:
        assert result.scales is None
        assert result.out.dtype == x.dtype
    else:
        assert result.out.dtype == quantize
        scales = np.asarray(result.scales, np.float64)
        largest = np.abs(expected).max(axis=1)
        scale = np.where(largest > 0, largest / LARGEST[quantize], 1.0)
        np.testing.assert_allclose(scales, scale, rtol=4 * ULP[dtype])
        assert (
            np.abs(out).max(axis=1) == np.where(largest > 0, LARGEST[quantize], 0)
        ).all()
        out = out * scales[:, None]
        step = (
            0.5
            if quantize == "int8"
            else np.abs(expected / scale[:, None]) / 16 + 2**-10
        )
        bound = bound + 1.01 * step * scale[:, None]
    np.testing.assert_array_less(np.abs(out - expected), bound)


@pytest.mark.parametrize("implementation", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants(variant, implementation):
    check(5, 256, "float32", implementation, variant)


@pytest.mark.parametrize("implementation", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_named_shapes(case, implementation):
    check(*case[1:], implementation, {"has_residual": True})


def test_width_that_is_no_power_of_two():
    check(3, 200, "float32", "gpu_triton", {"quantize": "int8"})


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize("shape", [(1, 1024), (33, 128), (130, 2560), (4, 5120)])
def test_all(shape, dtype, variant, implementation):
    check(*shape, dtype, implementation, variant)


@pytest.mark.parametrize("implementation", ["gpu_triton", "tpu"])
def test_bfloat16_is_rounded_as_by_the_reference(implementation):
    rng = np.random.default_rng(3)
    x, weight = (
        jnp.asarray(rng.normal(size=s), "bfloat16") for s in ((6, 128), (128,))
    )

    def call(name):
        target = TARGETS[name]
        return rms_norm(x, weight, 1e-6, implementation=name, target=target).out

    one, other = (
        np.asarray(call(n), np.float32) for n in ("reference", implementation)
    )
    assert (one == other).mean() > 0.98


@pytest.mark.parametrize("quantize", ["int8", "float8_e4m3fn"])
def test_rounds_to_nearest_even(quantize):
    wide = np.linspace(-140, 140, 2001).astype(np.float32)
    wide = np.concatenate([wide, np.arange(-8, 8) + np.float32(0.5), [1e9, -1e9]])
    from pallas_kernels.common.elementwise import saturate

    found = np.asarray(saturate(jnp.asarray(wide, "float32"), quantize), np.float32)
    if quantize == "int8":
        expected = np.clip(np.rint(wide), -128, 127)
    else:
        expected = np.clip(wide, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_reference_is_differentiable():
    x, weight = jnp.array([[1.0, -2.0, 3.0]]), jnp.array([1.0, 2.0, -1.0])
    total = lambda x: rms_norm(x, weight, 1e-3, target=Target("cpu")).out.sum()  # noqa: E731
    gradient = np.asarray(jax.grad(total)(x))
    for i in range(3):
        step = np.zeros((1, 3))
        step[0, i] = 1e-6
        ends = [
            solve(
                np.asarray(x, np.float64) + s * step, np.asarray(weight), None, 1e-3, 0
            )
            for s in (1, -1)
        ]
        slope = (ends[0] - ends[1]).sum() / 2e-6
        np.testing.assert_allclose(gradient[0, i], slope, rtol=1e-4, atol=1e-5)


def test_bad_arguments_are_named():
    call = inspect.unwrap(rms_norm)
    x, weight = jnp.zeros((2, 4)), jnp.zeros(4)
    with pytest.raises(ValueError, match="weight has shape"):
        call(x, jnp.zeros(3), 1e-5)
    with pytest.raises(ValueError, match="residual is"):
        call(x, weight, 1e-5, residual=jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="quantize='int4'"):
        call(x, weight, 1e-5, quantize="int4")
    with pytest.raises(ValueError, match="weight_offset=2"):
        call(x, weight, 1e-5, weight_offset=2)


def test_unsupported_is_said():
    x, weight = jnp.zeros((2, 40)), jnp.zeros(40)
    with pytest.raises(NotImplementedError, match="no multiple of 128"):
        rms_norm(x, weight, 1e-5, implementation="tpu", target=TARGETS["tpu"])
    old = Target("gpu", "sm_80", "a100", 108, interpret=True)
    with pytest.raises(NotImplementedError, match="sm_89"):
        rms_norm(
            x,
            weight,
            1e-5,
            quantize="float8_e4m3fn",
            implementation="gpu_triton",
            target=old,
        )


def test_kernel_cases_are_distinct_and_consistent():
    cases = kernel_cases()
    assert len({case.name for case in cases}) == len(cases)
    arrays = cases[1].make_arguments(np.random.default_rng(0))
    assert [a.shape for a in arrays] == [a.shape for a in cases[1].arguments]
