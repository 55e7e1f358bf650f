"""Products with stored weights against float64 numpy, on every backend."""

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
from pallas_kernels.quantized_matmul import (
    QuantizedWeight,
    quantize_per_token,
    quantized_matmul,
)
from pallas_kernels.quantized_matmul.cases import (
    CASES,
    MatmulCase,
    array_shapes,
    case_function,
    kernel_cases,
    make_arrays,
)
from tests.pallas_kernels.targets import gpu_target

GPU = gpu_target()
TPU = Target("tpu", "v6e", "v6e", 1, pltpu.InterpretParams(uninitialized_memory="nan"))
TARGETS = {"reference": Target("cpu"), "gpu_triton": GPU, "tpu": TPU}
# The others run with the full matrices.
QUICK = {
    "gpu_triton": {"one_row", "few_rows", "int4_zeros", "both_e4m3"},
    "tpu": {"few_rows", "int4_zeros"},
}
# Rounding of the result.
TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 2e-3}
BYTE_TYPES = ("int8", "float8_e4m3fn", "float8_e5m2")


def solve(case, arrays):
    """The product in float64 from the definitions of the formats; its magnitude."""
    x = arrays["x"].astype(np.float64)
    if "x_scales" in arrays:
        x = x * arrays["x_scales"].astype(np.float64)[:, None]
    if case.has_order:
        x = x[:, arrays["order"]]
    values = arrays["values"]
    weights = np.zeros((case.channels, case.inputs))
    for k in range(case.inputs):
        if case.weight == "int4":
            block, place = divmod(k, 256)
            byte = values[:, 128 * block + place % 128].astype(np.int64)
            nibble = byte // 16 if place >= 128 else byte % 16
            group = k // case.group
            zero = arrays["zeros"][:, group].astype(int) if case.has_zeros else 8
            weights[:, k] = (nibble - zero) * arrays["scales"][:, group].astype(float)
        else:
            weights[:, k] = values[:, k].astype(np.float64)
            if "scales" in arrays:
                weights[:, k] *= arrays["scales"].astype(np.float64)
    return x @ weights.T, np.abs(x) @ np.abs(weights).T


def check(case, implementation, target=None):
    arrays = make_arrays(case, np.random.default_rng(0))
    expected, magnitude = solve(case, arrays)
    target = target or TARGETS[implementation]
    function = case_function(case)
    out = jax.jit(
        lambda *values: function(*values, implementation=implementation, target=target)
    )(*arrays.values())
    quantized = case.dtype in BYTE_TYPES
    dtype = case.out_dtype or ("float32" if quantized else case.dtype)
    assert out.dtype == jnp.dtype(dtype)
    error = np.abs(np.asarray(out, np.float64) - expected)
    bound = TOLERANCE[dtype] * np.abs(expected) + 1e-6 * magnitude
    assert np.all(error <= bound), np.max(error / bound)


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


# Shapes that a kernel's tiles do not divide; types that both backends know.
TYPES = (
    ("bfloat16", "bfloat16"),
    ("bfloat16", "int8"),
    ("bfloat16", "float8_e4m3fn"),
    ("bfloat16", "float8_e5m2"),
    ("bfloat16", "int4"),
    ("float32", "float32"),
    ("float32", "int8"),
    ("float32", "float8_e4m3fn"),
    ("float32", "int4"),
    ("int8", "int8"),
    ("float8_e4m3fn", "float8_e4m3fn"),
    ("float8_e5m2", "float8_e5m2"),
)


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", TARGETS)
@hypothesis.settings(max_examples=20)
@hypothesis.given(
    rows=st.sampled_from([1, 2, 15, 16, 17, 33, 64, 130, 260]),
    channels=st.sampled_from([8, 64, 96, 136, 200, 264]),
    units=st.integers(1, 12),
    types=st.sampled_from(TYPES),
    group=st.sampled_from([32, 64, 128, 0]),
    has_zeros=st.booleans(),
    has_order=st.booleans(),
    out_dtype=st.sampled_from(["", "float32", "bfloat16"]),
)
def test_random_products_are_right(
    implementation, rows, channels, units, types, group, has_zeros, has_order, out_dtype
):
    inputs = 128 * units
    case = MatmulCase(
        "random",
        rows,
        channels,
        inputs,
        *types,
        group or inputs,
        has_zeros and types[1] == "int4",
        has_order,
        out_dtype,
    )
    check(case, implementation)


@pytest.mark.kernels
@pytest.mark.parametrize("generation", ["v5e", "tpu7x"])
@pytest.mark.parametrize("dtype", BYTE_TYPES)
def test_every_generation_multiplies_bytes(generation, dtype):
    target = Target("tpu", generation, generation, 1, pltpu.InterpretParams())
    check(MatmulCase("bytes", 7, 64, 256, dtype, dtype), "tpu", target)


@pytest.mark.kernels
@pytest.mark.parametrize("weight", ["float16", "int8", "float8_e5m2", "int4"])
@pytest.mark.parametrize("rows", [1, 20])
def test_float16_on_gpu(rows, weight):
    case = MatmulCase("half", rows, 72, 384, "float16", weight, has_zeros=True)
    check(case, "gpu_triton")


@pytest.mark.kernels
@pytest.mark.parametrize("weight", BYTE_TYPES)
def test_inputs_that_no_tile_divides(weight):
    check(MatmulCase("odd", 3, 40, 100, weight=weight), "gpu_triton")
    check(MatmulCase("odd", 1, 40, 100, weight=weight), "gpu_triton")
    check(MatmulCase("odd", 3, 40, 100, weight=weight), "tpu")


def test_parts_are_added_in_one_order():
    case = MatmulCase("parts", 2, 64, 2048)
    arrays = make_arrays(case, np.random.default_rng(1))
    call = jax.jit(
        lambda *values: case_function(case)(
            *values, implementation="gpu_triton", target=GPU
        )
    )
    first, second = (np.asarray(call(*arrays.values())) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", ["few_rows", "int4_zeros"])
def test_reference_has_gradients(name):
    (case,) = [case for case in CASES if case.name == name]
    case = MatmulCase(
        name, 3, 16, case.inputs, "float32", case.weight, case.group, case.has_zeros
    )
    arrays = make_arrays(case, np.random.default_rng(0))

    x, *rest = map(jnp.asarray, arrays.values())
    gradient = jax.grad(
        lambda x: jnp.sum(case_function(case)(x, *rest, target=Target("cpu")))
    )(x)
    # The gradient of a sum of products is the product of ones.
    eye = dict(arrays, x=np.eye(case.inputs, dtype=np.float32))
    expected, _ = solve(case, eye)
    expected = np.broadcast_to(expected.sum(1), gradient.shape)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_quantize_per_token(dtype):
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    x[2] = 0
    x[3] *= 1e6
    values, scales = quantize_per_token(jnp.asarray(x), dtype)
    assert values.dtype == jnp.dtype(dtype)
    restored = np.asarray(values, np.float64) * np.asarray(scales, np.float64)[:, None]
    largest = np.abs(x).max(1, keepdims=True)
    relative = {"int8": 0.0, "float8_e4m3fn": 2**-4, "float8_e5m2": 2**-3}[dtype]
    absolute = 0.5 / 127 if dtype == "int8" else 2**-10
    bound = relative * np.abs(x) + (absolute + 1e-6) * largest
    assert np.all(np.abs(restored - x) <= bound)
    assert scales[2] == 1
    limit = 127 if dtype == "int8" else float(jnp.finfo(dtype).max)
    assert np.max(np.abs(np.asarray(values[0], np.float64))) == limit


def test_quantize_per_token_refuses_other_types():
    with pytest.raises(ValueError, match="dtype=int16 must be int8"):
        quantize_per_token(jnp.zeros((1, 4)), jnp.int16)


@pytest.fixture
def without_shape_checks():
    """As outside of tests, where signatures are not checked before arguments."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def weight_of(values="int8", **parts):
    shape = (4, 128) if values == "uint8" else (4, 256)
    arrays = {"values": jnp.zeros(shape, values)}
    if values != "float32":
        arrays["scales"] = jnp.ones((4, 2) if values == "uint8" else (4,))
    return QuantizedWeight(**(arrays | parts))


X = jnp.zeros((2, 256))
X_INT8 = jnp.zeros((2, 256), jnp.int8)


@pytest.mark.parametrize(
    ("x", "weight", "options", "message"),
    [
        (X, weight_of(values="int16"), {}, "weight.values of int16 must be"),
        (X[:, :200], weight_of(), {}, r"values has shape \(4, 256\), expected"),
        (X, weight_of(scales=None), {}, "scales must be given for int8"),
        (X, weight_of(scales=jnp.ones(5)), {}, r"scales has shape \(5,\), expected"),
        (X, weight_of("float32", scales=jnp.ones(4)), {}, "must be None for plain"),
        (X, weight_of("float16"), {}, "float16 must be of float32"),
        (X, weight_of("uint8", scales=jnp.ones((4, 3))), {}, "3 groups"),
        (X, weight_of("uint8", scales=jnp.ones(4)), {}, r"must be \[N, G\]"),
        (X, weight_of("uint8", zeros=jnp.ones((4, 1))), {}, "zeros has shape"),
        (X, weight_of(zeros=jnp.ones((4, 2))), {}, "zeros must be None for int8"),
        (X, weight_of(order=jnp.arange(3)), {}, r"order has shape \(3,\)"),
        (X, weight_of(), {"x_scales": jnp.ones(2)}, "x_scales must be None"),
        (X, weight_of(), {"out_dtype": "int8"}, "out_dtype=int8 must be"),
        (X.astype("int32"), weight_of(), {}, "x of int32 must be"),
        (X_INT8, weight_of(), {}, "x_scales must be given"),
        (X_INT8, weight_of("float8_e5m2"), {}, "needs int8 weights, not float8"),
        (X_INT8, weight_of(), {"x_scales": jnp.ones(3)}, "x_scales has shape"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_bad_arguments_are_named(x, weight, options, message):
    if weight.scheme == "plain" and weight.values.dtype == jnp.float16:
        weight = QuantizedWeight(weight.values)
    with pytest.raises(ValueError, match=message):
        quantized_matmul(x, weight, target=Target("cpu"), **options)


def fallback(x, weight, target, **options):
    """What the automatic choice reports when the kernel cannot do it."""
    with collect_fallbacks() as found:
        jax.eval_shape(
            lambda x: quantized_matmul(x, weight, target=target, **options), x
        )
    return found[0].reason if found else ""


def test_what_a_kernel_cannot_do_falls_back_with_a_reason():
    groups = weight_of("uint8", scales=jnp.ones((4, 32)))
    assert "groups of 8" in fallback(X, groups, GPU)
    assert "groups of 8" in fallback(X, groups, TPU)
    assert "float16" in fallback(X.astype("float16"), weight_of(), TPU)
    old = Target("gpu", "sm_80", "a100", 108, interpret=True)
    assert "sm_80 has no float8" in fallback(X, weight_of("float8_e5m2"), old)
    assert "sm_75" in fallback(X, weight_of(), Target("gpu", "sm_75", "t4", 40))
    mixed = weight_of("float8_e5m2")
    x, scales = X.astype("float8_e4m3fn"), jnp.ones(2)
    assert "float8_e4m3fn and" in fallback(x, mixed, GPU, x_scales=scales)
    assert "float8_e4m3fn and" in fallback(x, mixed, TPU, x_scales=scales)
    assert fallback(X[:0], weight_of(), GPU) == "empty matrices"
    with pytest.raises(NotImplementedError, match="groups of 8"):
        quantized_matmul(X, groups, target=GPU, implementation="gpu_triton")


def test_weights_are_a_pytree():
    weight = weight_of("uint8", zeros=jnp.ones((4, 2), jnp.uint8))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weight
    )
    assert isinstance(shapes, QuantizedWeight)
    assert shapes.scheme == "int4"
    assert len(jax.tree.leaves(weight)) == 3


def test_kernel_cases_say_what_they_need():
    cases = kernel_cases()
    assert len({case.name for case in cases}) == len(cases)
    (case,) = [case for case in cases if case.name == "o-1-bfloat16-int4-g128"]
    packed, scales = 4096 * 4096 // 2, 4096 * 32 * 2
    assert case.num_bytes == packed + scales + 2 * 2 * 4096
    assert case.num_flops == 2 * 4096 * 4096
    small = MatmulCase("small", 2, 8, 256, weight="int4", has_zeros=True)
    arrays = make_arrays(small, np.random.default_rng(0))
    for name, (shape, dtype) in array_shapes(small).items():
        assert (arrays[name].shape, arrays[name].dtype.name) == (shape, dtype)
