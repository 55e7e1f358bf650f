"""Orders of int4 weights, against numpy written from the formats' definitions."""

import re

import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.common.target import Target
from pallas_kernels.quantized_matmul import (
    from_awq,
    from_gptq,
    pack_int4,
    quantized_matmul,
    unpack_int4,
)
from pallas_kernels.quantized_matmul.gpu_triton import unpacking_ptx


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("num_inputs", [1, 127, 128, 256, 300, 768])
def test_packing_and_back(rng, num_inputs):
    values = rng.integers(0, 16, (3, num_inputs))
    packed = np.asarray(pack_int4(jnp.asarray(values)))
    assert packed.shape == (3, -(-num_inputs // 256) * 128)
    for k in range(num_inputs):
        block, place = divmod(k, 256)
        byte = packed[:, 128 * block + place % 128]
        half = byte >> 4 if place >= 128 else byte & 15
        np.testing.assert_array_equal(half, values[:, k])
    np.testing.assert_array_equal(unpack_int4(jnp.asarray(packed), num_inputs), values)


def words(nibbles):
    """Joins eight nibbles, the lowest first, to one int32."""
    total = sum(int(nibble) << (4 * i) for i, nibble in enumerate(nibbles))
    return np.uint32(total).astype(np.int32)


def multiply(weight, num_inputs):
    """The dequantised matrix: the product of the identity, transposed."""
    eye = jnp.eye(num_inputs, dtype=jnp.float32)
    return np.asarray(quantized_matmul(eye, weight, target=Target("cpu"))).T


def test_awq(rng):
    num_inputs, num_channels, group = 256, 16, 64
    q = rng.integers(0, 16, (num_inputs, num_channels))
    zeros = rng.integers(0, 16, (num_inputs // group, num_channels))
    scales = rng.uniform(0.5, 1.5, zeros.shape).astype(np.float16)

    def pack(matrix):
        # A word: channels 0, 2, 4, 6, 1, 3, 5, 7 of eight from the lowest bits on.
        return np.array(
            [
                [
                    words(row[8 * word + np.array([0, 2, 4, 6, 1, 3, 5, 7])])
                    for word in range(num_channels // 8)
                ]
                for row in matrix
            ]
        )

    weight = from_awq(*map(jnp.asarray, (pack(q), pack(zeros), scales)))
    groups = np.arange(num_inputs) // group
    expected = (q - zeros[groups]) * scales[groups].astype(np.float64)
    np.testing.assert_allclose(multiply(weight, num_inputs), expected.T, rtol=1e-6)


@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(rng, act_order, zero_offset):
    num_inputs, num_channels, group = 384, 16, 128
    q = rng.integers(0, 16, (num_inputs, num_channels))
    stored = rng.integers(0, 16, (num_inputs // group, num_channels))
    scales = rng.uniform(0.5, 1.5, stored.shape).astype(np.float16)
    g_idx = np.arange(num_inputs) // group
    if act_order:
        g_idx = rng.permutation(g_idx)
    # A word of qweight: eight inputs of one channel; of qzeros: eight channels.
    qweight = np.array(
        [
            [words(q[8 * word : 8 * word + 8, n]) for n in range(num_channels)]
            for word in range(num_inputs // 8)
        ]
    )
    qzeros = np.array(
        [
            [words(row[8 * word : 8 * word + 8]) for word in range(num_channels // 8)]
            for row in stored
        ]
    )
    weight = from_gptq(
        jnp.asarray(qweight),
        jnp.asarray(qzeros),
        jnp.asarray(scales),
        jnp.asarray(g_idx) if act_order else None,
        zero_offset=zero_offset,
    )
    zeros = stored + zero_offset
    expected = (q - zeros[g_idx]) * scales[g_idx].astype(np.float64)
    np.testing.assert_allclose(multiply(weight, num_inputs), expected.T, rtol=1e-6)


@pytest.fixture
def without_shape_checks():
    """As outside of tests, where signatures are not checked before arguments."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_shape_checks")
def test_tensors_that_do_not_fit_are_named():
    qweight, qzeros = jnp.zeros((256, 2), jnp.int32), jnp.zeros((2, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"qzeros unpack to \(2, 16\)"):
        from_awq(qweight, qzeros, jnp.ones((4, 16)))
    with pytest.raises(ValueError, match="3 groups"):
        from_awq(qweight, jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 16)))
    qweight = jnp.zeros((32, 16), jnp.int32)
    with pytest.raises(ValueError, match="g_idx has shape"):
        from_gptq(qweight, qzeros, jnp.ones((2, 16)), jnp.zeros(3, jnp.int32))


def run_ptx(source, byte_word, minus_words, dtype):
    """Executes the few instructions that the kernel's assembly uses."""
    registers = {"$2": byte_word, "$3": minus_words[0], "$4": minus_words[1]}

    def read(operand):
        return registers[operand] if operand in registers else int(operand, 16)

    def lanes(word):
        return np.array([word], np.uint32).view(dtype).astype(np.float64)

    for line in re.sub(r"[{}]", "", source).split(";"):
        if not (parts := line.replace(",", " ").split()) or parts[0] == ".reg":
            continue
        name, to, *operands = parts
        a, *rest = map(read, operands) if name != "shr.b32" else (0,)
        if name == "shr.b32":
            registers[to] = read(operands[0]) >> int(operands[1])
        elif name == "mov.b32":
            registers[to] = a
        elif name == "and.b32":
            registers[to] = a & rest[0]
        elif name == "prmt.b32":
            pool = [(word >> 8 * i) & 255 for word in (a, rest[0]) for i in range(4)]
            chosen = [pool[(rest[1] >> 4 * i) & 7] for i in range(4)]
            registers[to] = sum(byte << 8 * i for i, byte in enumerate(chosen))
        else:
            assert name.startswith("fma.rn.")
            exact = lanes(a) * lanes(rest[0]) + lanes(rest[1])
            registers[to] = int(exact.astype(dtype).view(np.uint32)[0])
    return np.concatenate([lanes(registers["$0"]), lanes(registers["$1"])])


@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize(
    ("dtype", "offset"), [(ml_dtypes.bfloat16, 128), (np.float16, 1024)]
)
def test_assembly_unpacks_exactly(rng, dtype, offset, high):
    source = unpacking_ptx(dtype, high=high)
    for _ in range(50):
        packed = rng.integers(0, 256, 4).astype(np.uint8)
        zero = int(rng.integers(0, 17))
        minus = np.full(4, -offset - zero, dtype)
        out = run_ptx(
            source,
            int(packed.view(np.uint32)[0]),
            [int(word) for word in minus.view(np.uint32)],
            dtype,
        )
        nibbles = (packed >> 4 if high else packed & 15).astype(int)
        np.testing.assert_array_equal(out, nibbles - zero)
