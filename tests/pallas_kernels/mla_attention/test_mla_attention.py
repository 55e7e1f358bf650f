"""Latent attention against float64 numpy."""

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
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.mla_attention.cases import (
    CASES,
    SCALE,
    MlaCase,
    call,
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
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1.5e-3}
BY_NAME = {case.name: case for case in CASES}
NARROW = {"rank": 16, "rope": 16, "width": 32, "block_size": 4, "num_heads": 4}


def solve(q_latent, q_rope, latent, tables, row_starts, lengths):
    """One token after the other in float64; padding gives zeros."""
    rank = q_latent.shape[2]
    q = np.concatenate([q_latent, q_rope], axis=-1).astype(np.float64)
    pool = latent[..., : q.shape[2]].astype(np.float64)
    out = np.zeros(q_latent.shape)
    for row, length in enumerate(lengths):
        count = -(-length // pool.shape[1])
        keys = pool[tables[row, :count]].reshape(-1, pool.shape[2])
        last = row_starts[row + 1]
        for token in range(row_starts[row], last):
            seen = keys[: max(0, length - (last - token) + 1)]
            if len(seen):
                scores = q[token] @ seen.T * SCALE
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                products = weights @ seen[:, :rank]
                out[token] = products / weights.sum(-1, keepdims=True)
    return out


def check(case, implementation, seed=0, num_cores=132):
    check_arrays(make_arrays(case, seed), case.dtype, implementation, num_cores)


def check_arrays(arrays, dtype, implementation, num_cores=132):
    target = dataclasses.replace(TARGETS[implementation], num_cores=num_cores)
    attend = jax.jit(partial(call, implementation=implementation, target=target))
    found = np.asarray(attend(*map(jnp.asarray, arrays)), np.float64)
    check_races(implementation)
    expected = solve(*arrays)
    bound = TOLERANCE[dtype] * max(1, np.abs(expected).max())
    assert np.abs(found - expected).max() <= bound


def check_races(implementation):
    if implementation == "tpu":
        assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("implementation", ["reference", "gpu_triton"])
@pytest.mark.parametrize("name", ["decode", "mixed", "float8"])
def test_equals_float64(name, implementation):
    check(BY_NAME[name], implementation)


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", ["reference", "gpu_triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_float64_in_full(case, implementation):
    check(case, implementation)


def test_equals_float64_on_a_tpu():
    case = dataclasses.replace(
        BY_NAME["mixed"], lengths=(1, 40, 0, 130), num_new=(1, 9, 0, 1)
    )
    check(case, "tpu")


@pytest.mark.parametrize("num_cores", [1, 1000])
def test_any_number_of_parts(num_cores):
    """One part, and more than there are keys."""
    case = dataclasses.replace(BY_NAME["decode"], **NARROW)
    check(case, "gpu_triton", num_cores=num_cores)


def test_heads_that_are_no_power_of_two():
    check(
        dataclasses.replace(BY_NAME["mixed"], **NARROW | {"num_heads": 5}), "gpu_triton"
    )


@settings(max_examples=5)
@given(
    rows=st.lists(
        st.sampled_from([(0, 0), (1, 1), (3, 1), (4, 4), (5, 2), (64, 1), (65, 20)]),
        min_size=3,
        max_size=3,
    ),
    seed=st.integers(0, 1000),
)
def test_any_lengths(rows, seed):
    check_rows(rows, 61, seed)


@pytest.mark.kernels
@settings(max_examples=100)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 150), st.integers(0, 40)), min_size=4, max_size=4
    ),
    seed=st.integers(0, 1000),
)
def test_any_lengths_in_full(rows, seed):
    check_rows(rows, 161, seed)


def check_rows(rows, num_tokens, seed):
    """One compiled program for all rows: all arrays are as large as they may become."""
    lengths, num_new = zip(*rows, strict=True)
    padding = num_tokens - sum(num_new)
    case = MlaCase("random", lengths, num_new, padding=padding, **NARROW)
    q_latent, q_rope, pool, tables, *rest = make_arrays(case, seed)
    more = ((0, 160 - len(pool)), (0, 0), (0, 0))
    pool = np.pad(pool, more, constant_values=np.nan)
    tables = np.pad(tables, ((0, 0), (0, 45 - tables.shape[1])), constant_values=999)
    arrays = (q_latent, q_rope, pool, tables, *rest)
    check_arrays(arrays, "float32", "gpu_triton")


@pytest.mark.kernels
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_in_full_on_a_tpu(case):
    check(case, "tpu")


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", ["gpu_triton", "tpu"])
@pytest.mark.parametrize("latent_dtype", ["", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", ["decode", "verify", "mixed"])
def test_types_in_full(name, latent_dtype, implementation):
    case = dataclasses.replace(
        BY_NAME[name], dtype="bfloat16", latent_dtype=latent_dtype
    )
    check(case, implementation)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["decode", "verify", "mixed"])
def test_float16_in_full(name):
    check(dataclasses.replace(BY_NAME[name], dtype="float16"), "gpu_triton")


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", ["gpu_triton", "tpu"])
def test_widths_of_deepseek(implementation):
    case = MlaCase("wide", (300, 64), (1, 40), 128, 512, 64, 640, dtype="bfloat16")
    check(case, implementation)


def test_reference_has_gradients():
    case = MlaCase("small", (3, 6), (1, 2), 2, 3, 2, 5, 4, padding=1)
    q_latent, q_rope, pool, *rest = map(jnp.asarray, make_arrays(case))

    @jax.jit
    def total(*arrays):
        return jnp.sum(jnp.sin(call(*arrays, *rest, implementation="reference")))

    arrays = (q_latent, q_rope, jnp.nan_to_num(pool))
    check_grads(total, arrays, 1, ["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("implementation", ["gpu_triton", "tpu"])
def test_blocks_outside_the_pool_are_not_read(implementation):
    case = dataclasses.replace(BY_NAME["mixed"], lengths=(1, 40), num_new=(1, 9))
    q_latent, q_rope, pool, tables, *rest = make_arrays(case)
    target = TARGETS[implementation]
    attend = jax.jit(partial(call, implementation=implementation, target=target))
    for bad in (-1, 2**31 - 1):
        tables[:, 0] = bad
        clipped = np.clip(tables, 0, len(pool) - 1)
        outs = [
            attend(q_latent, q_rope, np.nan_to_num(pool), each, *rest)
            for each in (tables, clipped)
        ]
        np.testing.assert_array_equal(*outs)
        check_races(implementation)


def test_a_factor_of_the_latents_may_be_an_array():
    arrays = [jnp.asarray(a) for a in make_arrays(BY_NAME["one_row"])]
    options = {"implementation": "reference"}
    whole = call(*arrays, **options)
    halved = [*arrays[:2], arrays[2] * 0.5, *arrays[3:]]
    scale = jnp.float32(SCALE * 2)
    found = mla_attention(*halved, scale, **options) * 2
    np.testing.assert_allclose(found, whole, atol=1e-6)


@pytest.mark.parametrize(
    ("index", "shape", "word"),
    [
        (1, (4, 15, 16), "q_rope"),
        (2, (5, 32, 140), "latent has shape"),
        (3, (2, 4), "block_tables"),
        (4, (3,), "row_starts"),
    ],
)
def test_wrong_shapes_are_named(index, shape, word):
    arrays = [jnp.asarray(a) for a in make_arrays(BY_NAME["one_row"])]
    arrays[index] = jnp.zeros(shape, arrays[index].dtype)
    with pytest.raises(ValueError, match=word):
        inspect.unwrap(mla_attention)(*arrays, SCALE)


@pytest.mark.parametrize(
    ("implementation", "changes", "word"),
    [
        ("gpu_triton", {"rank": 96}, "R=96"),
        ("gpu_triton", {"rope": 8}, "Dr=8"),
        ("gpu_triton", {"latent_dtype": "int8"}, "int8 latents"),
        ("tpu", {"dtype": "float16"}, "float16"),
        ("tpu", {"num_heads": 12}, "12 heads"),
        ("tpu", {"rank": 64}, "R=64"),
        ("tpu", {"block_size": 16}, "blocks of 16"),
    ],
)
def test_what_is_not_supported_says_why(implementation, changes, word):
    case = MlaCase("small", (4,), (1,))
    arrays = [
        jnp.asarray(a)
        for a in make_arrays(
            dataclasses.replace(
                case, **{k: v for k, v in changes.items() if k != "latent_dtype"}
            )
        )
    ]
    if "latent_dtype" in changes:
        arrays[2] = jnp.zeros(arrays[2].shape, changes["latent_dtype"])
    target = TARGETS[implementation]
    with pytest.raises(NotImplementedError, match=word):
        call(*arrays, implementation=implementation, target=target)


def test_real_cases_are_distinct():
    names = [(case.name, case.implementations) for case in kernel_cases()]
    assert len(set(names)) == len(names)
    for case in kernel_cases():
        assert case.num_bytes > 0
        assert case.num_flops > 0
