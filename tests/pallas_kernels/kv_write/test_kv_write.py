"""Cache writes and block copies of every implementation against numpy."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from pallas_kernels import copy_blocks, kv_write
from pallas_kernels.kv_write import HeadNorms, Heads, Rotation, qkv_write, tpu
from pallas_kernels.kv_write.cases import CASES, kernel_cases
from tests.pallas_kernels.kv_write.oracle import (
    TARGETS,
    ULP,
    Write,
    check_pool,
    draw,
    prepared,
)

NUM_BLOCKS = 11
KERNELS = ("gpu_triton", "tpu")


def check_write(write, implementation, seed=0):
    pool, heads, slots, scales, _, _ = draw(write, seed)
    call = lambda *arrays: kv_write(  # noqa: E731
        *arrays,
        kv_scales=scales,
        implementation=implementation,
        target=TARGETS[implementation],
    )
    out = jax.jit(call)(jnp.asarray(pool), heads.keys, heads.values, slots)
    out.block_until_ready()
    if implementation == "tpu":
        assert not interpret_pallas_call.races.races_found
    new = [np.asarray(x, np.float64) for x in heads[1:]]
    check_pool(pool, np.asarray(out), new, slots, scales, ULP.get(write.kv_dtype, 1e-6))


def check_qkv(write, implementation, seed=0):
    pool, heads, slots, scales, rotation, norms = draw(write, seed)
    call = lambda *arrays: qkv_write(  # noqa: E731
        *arrays,
        norms=norms,
        kv_scales=scales,
        implementation=implementation,
        target=TARGETS[implementation],
    )
    q, out = jax.jit(call)(heads, jnp.asarray(pool), slots, rotation)
    weights = (None, None) if norms is None else (norms.q, norms.keys)
    expected, keys = (
        prepared(x, weight, rotation, norms)
        for x, weight in zip(heads[:2], weights, strict=True)
    )
    assert q.dtype == heads.q.dtype
    tolerance = 4 * ULP[write.dtype]
    # Rounding in between is of the size of the summands.
    error = np.abs(np.asarray(q, np.float64) - expected)
    assert (error <= tolerance * (np.abs(expected) + 1)).all()
    new = [keys, np.asarray(heads.values, np.float64)]
    check_pool(pool, np.asarray(out), new, slots, scales, 10 * tolerance)


WRITES = {
    "bfloat16": Write(40, dtype="bfloat16", kv_dtype="bfloat16"),
    "int8": Write(20, block_size=32, dtype="bfloat16", kv_dtype="int8"),
    "float8_e4m3fn": Write(9, block_size=32, kv_dtype="float8_e4m3fn"),
    "one_token_one_head": Write(1, num_kv_heads=1, block_size=128),
}


@pytest.mark.parametrize("implementation", TARGETS)
@pytest.mark.parametrize("name", WRITES)
def test_writes_only_its_slots(name, implementation):
    check_write(WRITES[name], implementation)


def test_groups_that_share_a_tile(monkeypatch):
    monkeypatch.setattr(tpu, "MAX_GROUP", 6)
    write = dataclasses.replace(WRITES["bfloat16"], num_tokens=21)
    check_write(write, "tpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
@pytest.mark.parametrize("implementation", ["reference", "gpu_triton"])
def test_named_shapes(case, implementation):
    _, num_tokens, num_kv_heads, head_dim, block_size, dtype = case
    write = Write(
        num_tokens,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        num_blocks=NUM_BLOCKS,
        dtype=dtype,
        kv_dtype=dtype,
    )
    check_write(write, implementation)


QKV_WRITES = {
    "plain": Write(5),
    "norms": Write(9, dtype="bfloat16", kv_dtype="bfloat16", norm_offset=0),
    "gemma_norms": Write(3, norm_offset=1, num_heads=3, num_kv_heads=1),
    "partial_rotation": Write(4, rotary_dim=64, norm_offset=0),
    "int8": Write(7, block_size=32, kv_dtype="int8", norm_offset=0),
}


@pytest.mark.parametrize("implementation", ["reference", "gpu_triton"])
@pytest.mark.parametrize("name", QKV_WRITES)
def test_fused_write(name, implementation):
    check_qkv(QKV_WRITES[name], implementation)


@pytest.mark.parametrize("name", ["norms", "gemma_norms"])
def test_fused_write_on_tpu(name):
    check_qkv(QKV_WRITES[name], "tpu")


@pytest.mark.parametrize("implementation", ["reference", "gpu_triton"])
def test_fused_write_of_odd_widths(implementation):
    write = Write(3, head_dim=80, rotary_dim=40, norm_offset=0)
    check_qkv(write, implementation)


@pytest.mark.parametrize(
    "implementation",
    ["reference", pytest.param("tpu", marks=pytest.mark.kernels)],
)
def test_fused_write_into_a_wider_pool(implementation):
    write = Write(3, head_dim=64, rotary_dim=64)
    pool, heads, slots, _, rotation, _ = draw(write)
    wide = np.pad(pool, ((0, 0),) * 4 + ((0, 64),), constant_values=7.0)
    target = TARGETS[implementation]
    q, out = qkv_write(
        heads,
        jnp.asarray(wide),
        slots,
        rotation,
        implementation=implementation,
        target=target,
    )
    assert q.shape == (3, 4, 128)
    assert not np.asarray(q)[..., 64:].any()
    keys = prepared(heads.keys, None, rotation, None)
    new = [
        np.pad(x, ((0, 0), (0, 0), (0, 64))) for x in (keys, np.asarray(heads.values))
    ]
    check_pool(wide, np.asarray(out), new, slots, None, 1e-5)


@pytest.mark.kernels
@settings(max_examples=12)
@given(
    num_tokens=st.integers(1, 70),
    num_kv_heads=st.sampled_from([1, 2, 4, 8, 3]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    kv_dtype=st.sampled_from(
        ["float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2"]
    ),
    block_size=st.sampled_from([32, 128]),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("implementation", TARGETS)
def test_all_writes(implementation, seed, **fields):
    check_write(Write(**fields), implementation, seed)


@pytest.mark.kernels
@settings(max_examples=12)
@given(
    num_tokens=st.integers(1, 40),
    heads=st.sampled_from([(4, 1), (8, 8), (6, 3), (4, 4)]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    kv_dtype=st.sampled_from(["float32", "bfloat16", "int8", "float8_e4m3fn"]),
    rotary_dim=st.sampled_from([128, 64, 32]),
    norm_offset=st.sampled_from([None, 0, 1]),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("implementation", TARGETS)
def test_all_fused_writes(implementation, heads, seed, **fields):
    write = Write(num_heads=heads[0], num_kv_heads=heads[1], block_size=32, **fields)
    check_qkv(write, implementation, seed)


@pytest.mark.parametrize("implementation", TARGETS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_copies_blocks_and_drops_padding(implementation, dtype):
    pool = (np.arange(6 * 2 * 8 * 128) % 251 - 120).astype(dtype).reshape(6, 2, 8, 128)
    sources = jnp.array([1, 0, 0, -3, 99, 1, 2, 2, 2, 2, 2], jnp.int32)
    targets = jnp.array([4, 6, -1, 3, 0, 7, 8, 9, 10, 11, 12], jnp.int32)
    out = copy_blocks(
        jnp.asarray(pool),
        sources,
        targets,
        implementation=implementation,
        target=TARGETS[implementation],
    )
    expected = pool.copy()
    expected[4], expected[3], expected[0] = pool[1], pool[0], pool[5]
    np.testing.assert_array_equal(np.asarray(out), expected)


def test_copies_blocks_of_a_matrix():
    pool = np.arange(24.0, dtype=np.float32).reshape(6, 4)
    for implementation in ("reference", "gpu_triton"):
        out = copy_blocks(
            jnp.asarray(pool),
            jnp.array([1, 0, 0], jnp.int32),
            jnp.array([4, 6, 7], jnp.int32),
            implementation=implementation,
            target=TARGETS[implementation],
        )
        expected = pool.copy()
        expected[4] = pool[1]
        np.testing.assert_array_equal(np.asarray(out), expected)


def test_a_pool_of_bits():
    write = Write(5, dtype="bfloat16", kv_dtype="bfloat16")
    pool, heads, slots, _, _, _ = draw(write)
    bits = jnp.asarray(pool.view(np.uint16))
    out = np.asarray(kv_write(bits, heads.keys, heads.values, slots))
    new = [np.asarray(x, np.float64) for x in heads[1:]]
    check_pool(pool, out.view(pool.dtype), new, slots, None, 0.0)


def test_the_donated_pool_keeps_its_address():
    pool = jnp.zeros((64, 2, 2, 16, 32))
    address = pool.unsafe_buffer_pointer()
    write = jax.jit(kv_write, donate_argnums=0)
    new = jnp.ones((3, 2, 32))
    out = write(pool, new, new, jnp.array([5, 17, 900]))
    assert out.unsafe_buffer_pointer() == address


@pytest.mark.parametrize("shape", [(3, 1, 32), (3, 2, 16)])
def test_wrong_shapes_are_named(shape):
    pool = jnp.zeros((4, 2, 2, 16, 32))
    with pytest.raises(ValueError, match="do not fit the pool"):
        inspect.unwrap(kv_write)(
            pool, jnp.zeros(shape), jnp.zeros(shape), jnp.arange(3)
        )


def test_scales_belong_to_quantized_pools():
    new, slots = jnp.zeros((3, 2, 32)), jnp.arange(3)
    call = inspect.unwrap(kv_write)
    with pytest.raises(ValueError, match="int8 needs kv_scales"):
        call(jnp.zeros((4, 2, 2, 16, 32), "int8"), new, new, slots)
    pool = jnp.zeros((4, 2, 2, 16, 32))
    with pytest.raises(ValueError, match="float32 takes no kv_scales"):
        call(pool, new, new, slots, kv_scales=jnp.ones((2, 2)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": (3, 4, 16)}, "does not fit the keys"),
        ({"cos": (3, 17)}, "F of at most 16"),
        ({"sin": (3, 8)}, "rotation.sin has shape"),
        ({"norm": (31,)}, "norms.q has shape"),
        ({"slots": (4,)}, "rotation.cos has shape"),
    ],
)
def test_wrong_heads_are_named(change, words):
    shapes = {"q": (3, 4, 32), "cos": (3, 16), "sin": (3, 16), "norm": (32,)}
    shapes |= {"slots": (3,)} | change
    arrays = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    new = jnp.zeros((3, 2, 32))
    with pytest.raises(ValueError, match=words):
        inspect.unwrap(qkv_write)(
            Heads(arrays["q"], new, new),
            jnp.zeros((4, 2, 2, 16, 32)),
            arrays["slots"].astype(jnp.int32),
            Rotation(arrays["cos"], arrays["sin"]),
            norms=HeadNorms(arrays["norm"], arrays["norm"], 1e-5),
        )


@pytest.mark.parametrize(
    ("implementation", "write", "words"),
    [
        ("tpu", Write(1, head_dim=64), "no multiple of 128"),
        ("tpu", Write(1, block_size=4), "no multiple of the 8 rows"),
        ("tpu", Write(1, dtype="float16", kv_dtype="float16"), "no vectors of float16"),
    ],
)
def test_unsupported_is_said(implementation, write, words):
    pool, heads, slots, _, _, _ = draw(write)
    with pytest.raises(NotImplementedError, match=words):
        kv_write(
            jnp.asarray(pool),
            heads.keys,
            heads.values,
            slots,
            implementation=implementation,
            target=TARGETS[implementation],
        )


def test_offsets_that_would_overflow_are_refused():
    spec = jax.ShapeDtypeStruct
    pool, new = spec((2**17, 2, 8, 16, 128), "int8"), spec((1, 8, 128), "bfloat16")
    with pytest.raises(NotImplementedError, match="overflow"):
        jax.eval_shape(
            lambda *arrays: kv_write(
                *arrays[:4],
                kv_scales=arrays[4],
                implementation="gpu_triton",
                target=TARGETS["gpu_triton"],
            ),
            pool,
            new,
            new,
            spec((1,), "int32"),
            spec((2, 8), "float32"),
        )


def test_kernel_cases_are_distinct_and_consistent():
    cases = kernel_cases()
    assert len({case.name for case in cases}) == len(cases)
    case = min(cases, key=lambda case: case.arguments[0].size)
    arrays = case.make_arguments(np.random.default_rng(0))
    assert [a.shape for a in arrays] == [a.shape for a in case.arguments]
    assert dataclasses.is_dataclass(case)
