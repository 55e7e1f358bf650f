"""Decode attention on TPUs, interpreted: memory of NaN, late DMA, races detected."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.common import tpu_attention
from pallas_kernels.common.cases import make_problem, solve
from pallas_kernels.common.kv_update import NewTokens
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.common.tpu_attention_kernel import TileSizes
from pallas_kernels.paged_attention import tpu
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.update import paged_attention_update
from tests.pallas_kernels.paged_cache import (
    TOLERANCE,
    TPU,
    TPU_LENGTHS,
    assert_close,
    assert_no_races,
    assert_same,
    check_blocks_outside,
    optional,
    store,
    tpu_case,
)

CASES = (
    tpu_case("ragged", (1, 7, 8, 0, 9, 40), (1, 1, 1, 0, 1, 1), num_kv_heads=2),
    tpu_case(
        "everything",
        (70, 5, 33),
        (1, 1, 1),
        dtype="bfloat16",
        kv_dtype="int8",
        block_size=32,
        window=20,
        soft_cap=3.0,
        has_sinks=True,
        has_alibi=True,
    ),
)
MATRIX = (
    tpu_case("verify", (3, 17, 48), (3, 3, 3)),
    tpu_case("before_position_0", (2, 17), (2, 3)),
    tpu_case("all_empty", (0, 0), (0, 0)),
    tpu_case("long", (200, 3), (1, 1)),
    tpu_case("groups_of_7", (20, 9), (1, 1), num_heads=14, num_kv_heads=2),
    tpu_case("many_kv_heads", (20, 9), (1, 1), num_heads=10, num_kv_heads=10),
    tpu_case("width_256", (20, 9), (1, 1), head_dim=256),
    tpu_case("blocks_of_128", (300, 9), (1, 1), block_size=128),
    tpu_case("bfloat16", (60, 20), (1, 1), dtype="bfloat16", block_size=16),
    tpu_case(
        "float16", (60, 20), (1, 1), dtype="float16", kv_dtype="bfloat16", block_size=16
    ),
    tpu_case("float32_over_bfloat16", (60,), (1,), kv_dtype="bfloat16", block_size=16),
    *(
        tpu_case(name, (60, 20), (1, 1), kv_dtype=name, block_size=32)
        for name in ("int8", "float8_e4m3fn", "float8_e5m2")
    ),
    tpu_case("window", (70, 9, 33), (1, 1, 1), window=9),
    tpu_case("window_of_one", (70, 9), (1, 1), window=1),
    tpu_case("soft_cap", (70, 9), (1, 1), soft_cap=2.0),
    tpu_case("sinks", (70, 0), (1, 0), has_sinks=True),
    tpu_case("alibi", (70, 9), (1, 1), has_alibi=True),
    tpu_case("shared_blocks", (70, 64), (1, 1), shared_blocks=3),
)


@pytest.fixture(autouse=True)
def two_blocks_at_once(monkeypatch):
    """Chunks of two blocks, so that small cases have several."""
    keep = tpu._tile_sizes

    def sizes(num_new, cache, target):
        made = keep(num_new, cache, target)
        few = min(2, cache.block_tables.shape[1])
        return dataclasses.replace(made, blocks_per_chunk=few, num_buffers=3)

    monkeypatch.setattr(tpu, "_tile_sizes", sizes)


def by_row(case):
    """Maps arrays of the packed tokens to `[S, Q, ...]`; rows may have fewer than Q."""
    num_new = max(max(case.num_new), 1)
    places = [
        row * num_new + num_new - count + i
        for row, count in enumerate(case.num_new)
        for i in range(count)
    ]

    def arrange(packed):
        out = np.zeros((len(case.lengths) * num_new, *packed.shape[1:]), packed.dtype)
        out[places] = packed[: len(places)]
        return out.reshape(len(case.lengths), num_new, *packed.shape[1:])

    return arrange


def attend(problem, q):
    out = jax.jit(paged_attention, static_argnames=("implementation", "target"))(
        jnp.asarray(q),
        jnp.asarray(problem.kv),
        jnp.asarray(problem.block_tables),
        jnp.asarray(problem.lengths),
        problem.options,
        kv_scales=optional(problem.kv_scales),
        implementation="tpu",
        target=TPU,
    )
    assert_no_races()
    return out


def check_attention(case, seed=0):
    problem = make_problem(case, seed)
    arrange = by_row(case)
    out = attend(problem, arrange(problem.q))
    assert_close(out, arrange(solve(problem)), TOLERANCE[case.dtype])


def check_update(case, seed=0, scale=1.0):
    problem = make_problem(case, seed)
    rng = np.random.default_rng(seed)
    shape = (2, len(problem.q), case.num_kv_heads, case.head_dim)
    new = (scale * rng.normal(size=shape)).astype(problem.q.dtype)
    before, after = store(problem, case, new)
    arrange = by_row(case)
    update = jax.jit(
        paged_attention_update,
        static_argnames=("implementation", "target"),
        donate_argnums=1,
    )
    out, kv = update(
        NewTokens(*(jnp.asarray(arrange(x)) for x in (problem.q, new[0], new[1]))),
        jnp.asarray(before),
        jnp.asarray(problem.block_tables),
        jnp.asarray(problem.lengths),
        problem.options,
        kv_scales=optional(problem.kv_scales),
        implementation="tpu",
        target=TPU,
    )
    assert_no_races()
    assert_same(kv, after)
    expected = arrange(solve(dataclasses.replace(problem, kv=after)))
    assert_close(out, expected, TOLERANCE[case.dtype])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_float64(case):
    check_attention(case)


def test_update_stores_and_attends():
    check_update(tpu_case("update", (9, 3, 17, 0), (3, 3, 3, 0)))


@pytest.mark.kernels
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name)
def test_matrix_equals_float64(case):
    check_attention(case)


@pytest.mark.kernels
@pytest.mark.parametrize("case", [*CASES, *MATRIX], ids=lambda case: case.name)
def test_matrix_of_updates(case):
    check_update(case)


@pytest.mark.kernels
@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_what_is_out_of_range_is_stored_as_the_bound(kv_dtype):
    case = tpu_case("far", (9, 3), (1, 1), kv_dtype=kv_dtype, block_size=32)
    check_update(case, scale=1e6)


@pytest.mark.kernels
@settings(max_examples=8)
@given(
    lengths=st.lists(st.sampled_from(TPU_LENGTHS), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_any_lengths(lengths, seed):
    new = tuple(min(length, 1) for length in lengths)
    check_update(tpu_case("random", tuple(lengths), new), seed)


def test_blocks_outside_the_pool_are_not_read():
    problem = make_problem(tpu_case("outside", (9, 17), (1, 1)), num_padding=0)
    few = (-1, 2**31 - 1)
    check_blocks_outside(lambda each: attend(each, each.q), problem, few)


@pytest.mark.kernels
def test_blocks_outside_the_pool_are_not_written():
    case = tpu_case("outside", (9, 17), (1, 1))
    problem = make_problem(case)
    tables = problem.block_tables.copy()
    tables[:, :3] = [[0, -3, 0], [1, 2, len(problem.kv) + 100]]
    new = NewTokens(jnp.ones((2, 2, 128)), jnp.ones((2, 1, 128)), jnp.ones((2, 1, 128)))
    out, kv = paged_attention_update(
        new,
        jnp.zeros(problem.kv.shape),
        jnp.asarray(tables),
        jnp.asarray(problem.lengths),
        problem.options,
        implementation="tpu",
        target=TPU,
    )
    assert_no_races()
    assert not np.any(np.asarray(kv))
    assert np.all(np.isfinite(np.asarray(out)))


def test_only_blocks_in_the_window_are_read():
    cache = tpu_attention.PagedCache(
        jnp.zeros((4, 2, 1, 8, 128)), jnp.zeros((4, 10), jnp.int32), None
    )
    sizes = TileSizes(
        tile_q=2, small_q=0, blocks_per_chunk=2, num_buffers=2, is_ragged=False
    )
    options = ScoreOptions(scale=1.0, window=9)
    shape = tpu_attention._describe(jnp.zeros((8, 2, 128)), cache, options, sizes)
    rows = jnp.arange(4)
    # The newest of two tokens at 1, 16, 40 and, behind the table, 90.
    tiles = tpu_attention.Tiles(
        rows, rows * 2, jnp.full(4, 2), jnp.array([0, 15, 39, 89]), jnp.asarray(4)
    )
    first, end = tpu_attention._visible_blocks(tiles, shape)
    assert first.tolist() == [0, 0, 3, 10]
    assert end.tolist() == [1, 3, 6, 10]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"head_dim": 64}, "head width 64"),
        ({"block_size": 12}, "block size 12"),
        ({"dtype": jnp.float16}, "TPUs have no vectors"),
        ({"max_blocks": 2**18}, "scalar memory"),
    ],
)
def test_what_is_not_supported_says_why(change, word):
    sizes = {"head_dim": 128, "block_size": 8, "dtype": jnp.float32, "max_blocks": 3}
    head_dim, block_size, dtype, max_blocks = (sizes | change).values()
    target = Target("tpu", "v6e", "v6e", 1)
    with pytest.raises(NotImplementedError, match=word):
        jax.eval_shape(
            lambda q, kv, tables, lengths: paged_attention(
                q,
                kv,
                tables,
                lengths,
                ScoreOptions(scale=1.0),
                implementation="tpu",
                target=target,
            ),
            jax.ShapeDtypeStruct((2, 4, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((4, 2, 2, block_size, head_dim), dtype),
            jax.ShapeDtypeStruct((2, max_blocks), jnp.int32),
            jax.ShapeDtypeStruct((2,), jnp.int32),
        )


def test_reference_update_equals_float64():
    case = tpu_case("reference", (9, 3, 17, 0), (2, 2, 2, 0), head_dim=8)
    problem = make_problem(case)
    rng = np.random.default_rng(0)
    new = rng.normal(size=(2, len(problem.q), 1, 8)).astype(np.float32)
    before, after = store(problem, case, new)
    arrange = by_row(case)
    out, kv = paged_attention_update(
        NewTokens(*(jnp.asarray(arrange(x)) for x in (problem.q, new[0], new[1]))),
        jnp.asarray(before),
        jnp.asarray(problem.block_tables),
        jnp.asarray(problem.lengths),
        problem.options,
    )
    assert_same(kv, after)
    expected = arrange(solve(dataclasses.replace(problem, kv=after)))
    np.testing.assert_allclose(np.asarray(out), expected, atol=2e-6, rtol=2e-6)
