"""Gated activations of every implementation against float64 numpy."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.target import Target
from pallas_kernels.silu_mul import silu_mul
from pallas_kernels.silu_mul.cases import CASES, kernel_cases
from tests.pallas_kernels.targets import gpu_target

TARGETS = {
    "reference": Target("cpu"),
    "gpu_triton": gpu_target(),
    "tpu": Target("tpu", "v6e", "v6e", 1, interpret=pltpu.InterpretParams()),
}
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    ),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
}
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}


def check(num_tokens, width, dtype, activation, implementation, scale=3.0):
    if implementation == "tpu" and dtype == "float16":
        pytest.skip("no float16 on TPU")
    rng = np.random.default_rng(num_tokens + width)
    x = jnp.asarray(rng.normal(size=(num_tokens, 2 * width)) * scale, dtype)
    out = jax.jit(
        lambda x: silu_mul(
            x,
            activation=activation,
            implementation=implementation,
            target=TARGETS[implementation],
        )
    )(x)
    assert out.dtype == x.dtype
    wide = np.asarray(x, np.float64)
    expected = ACTIVATIONS[activation](wide[:, :width]) * wide[:, width:]
    error = np.abs(np.asarray(out, np.float64) - expected)
    bound = TOLERANCE[dtype] * (np.abs(expected) + 0.5 * (dtype == "float32"))
    np.testing.assert_array_less(error, 2 * bound + 1e-6)


@pytest.mark.parametrize("implementation", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_named_shapes(case, implementation):
    check(*case[1:], "silu", implementation)


@pytest.mark.parametrize("implementation", TARGETS)
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_gelu(activation, implementation):
    check(4, 256, "float32", activation, implementation)


def test_width_that_no_tile_divides():
    check(3, 1100, "float32", "silu", "gpu_triton")


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", TARGETS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 128), (7, 1280), (300, 256), (65, 1408)])
def test_all(shape, dtype, activation, implementation):
    check(*shape, dtype, activation, implementation, scale=5.0)


@pytest.mark.parametrize("implementation", ["gpu_triton", "tpu"])
def test_large_scores_are_finite(implementation):
    x = jnp.concatenate([jnp.full((1, 128), v) for v in (-1e4, 1.0)], axis=1)
    target = TARGETS[implementation]
    for activation in ACTIVATIONS:
        out = silu_mul(
            x, activation=activation, implementation=implementation, target=target
        )
        assert np.asarray(out).tolist() == [[0.0] * 128]


def test_reference_is_differentiable():
    x = jnp.linspace(-2.0, 2.0, 8).reshape(1, 8)
    gradient = jax.grad(lambda x: silu_mul(x, target=Target("cpu")).sum())(x)
    gate, up = np.split(np.asarray(x, np.float64), 2, axis=1)
    sigmoid = 1 / (1 + np.exp(-gate))
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    expected = np.concatenate([slope * up, gate * sigmoid], axis=1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_bad_arguments_are_named():
    call = inspect.unwrap(silu_mul)
    with pytest.raises(ValueError, match="must be even"):
        call(jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="activation='relu'"):
        call(jnp.zeros((1, 4)), activation="relu")


def test_unsupported_is_said():
    with pytest.raises(NotImplementedError, match="no multiple of 128"):
        silu_mul(jnp.zeros((1, 8)), implementation="tpu", target=TARGETS["tpu"])


def test_kernel_cases_are_distinct_and_consistent():
    cases = kernel_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases[:1]:
        arrays = case.make_arguments(np.random.default_rng(0))
        assert [a.shape for a in arrays] == [a.shape for a in case.arguments]
