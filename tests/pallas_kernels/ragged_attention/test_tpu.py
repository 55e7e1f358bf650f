"""Prefill attention on TPUs, interpreted: memory of NaN, late DMA, races detected."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.common.cases import make_problem, solve
from pallas_kernels.common.kv_update import NewTokens
from pallas_kernels.ragged_attention import tiles, tpu
from pallas_kernels.ragged_attention.api import ragged_attention
from pallas_kernels.ragged_attention.update import ragged_attention_update
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

MIXED = tpu_case("mixed", (1, 7, 25, 40, 0, 13), (1, 7, 9, 1, 0, 13))
EVERYTHING = tpu_case(
    "everything",
    (70, 33, 5),
    (20, 1, 5),
    dtype="bfloat16",
    kv_dtype="int8",
    block_size=32,
    window=20,
    soft_cap=3.0,
    has_sinks=True,
    has_alibi=True,
)
MATRIX = (
    tpu_case("one_prompt", (37,), (37,)),
    tpu_case("chunk_after_prefix", (200,), (30,)),
    tpu_case("single_tokens", (9, 33, 1), (1, 1, 1)),
    tpu_case("all_empty", (0, 0), (0, 0)),
    tpu_case("two_kv_heads", (20, 9), (20, 2), num_heads=4, num_kv_heads=2),
    tpu_case("groups_of_7", (20, 9), (20, 2), num_heads=14, num_kv_heads=2),
    tpu_case("many_kv_heads", (20, 9), (7, 2), num_heads=10, num_kv_heads=10),
    tpu_case("width_256", (20, 9), (20, 2), head_dim=256),
    tpu_case("blocks_of_128", (300, 9), (20, 2), block_size=128),
    tpu_case("bfloat16", (60, 20), (30, 20), dtype="bfloat16", block_size=16),
    tpu_case(
        "float16",
        (60, 20),
        (30, 2),
        dtype="float16",
        kv_dtype="bfloat16",
        block_size=16,
    ),
    tpu_case("float32_over_bfloat16", (60,), (30,), kv_dtype="bfloat16", block_size=16),
    *(
        tpu_case(name, (60, 20), (30, 2), kv_dtype=name, block_size=32)
        for name in ("int8", "float8_e4m3fn", "float8_e5m2")
    ),
    tpu_case("window", (70, 33), (30, 33), window=9),
    tpu_case("window_of_one", (70, 9), (20, 9), window=1),
    tpu_case("soft_cap", (70, 9), (20, 9), soft_cap=2.0),
    tpu_case("sinks", (70, 9), (20, 9), has_sinks=True),
    tpu_case("alibi", (70, 9), (20, 9), has_alibi=True),
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 rows and chunks of two blocks: small cases have several."""
    keep = tpu._tile_sizes

    def layout(q, kv, target):
        tokens = max(1, 16 * kv.shape[2] // q.shape[1])
        return tiles.TileLayout(tokens, with_padding=True)

    def sizes(q, cache, target):
        made = keep(q, cache, target)
        return dataclasses.replace(
            made,
            small_q=2 if made.tile_q > 2 else 0,
            blocks_per_chunk=min(2, cache.block_tables.shape[1]),
        )

    monkeypatch.setattr(tpu, "tile_layout", layout)
    monkeypatch.setattr(tpu, "_tile_sizes", sizes)


def runs_of(problem):
    return tiles.TokenRuns(*map(jnp.asarray, (problem.row_starts, problem.lengths)))


def attend(problem):
    out = jax.jit(ragged_attention, static_argnames=("implementation", "target"))(
        jnp.asarray(problem.q),
        jnp.asarray(problem.kv),
        jnp.asarray(problem.block_tables),
        runs_of(problem),
        problem.options,
        kv_scales=optional(problem.kv_scales),
        implementation="tpu",
        target=TPU,
    )
    assert_no_races()
    return out


def check_attention(case, seed=0):
    problem = make_problem(case, seed)
    assert_close(attend(problem), solve(problem), TOLERANCE[case.dtype])


def check_update(case, seed=0, implementation="tpu"):
    problem = make_problem(case, seed)
    rng = np.random.default_rng(seed)
    shape = (2, len(problem.q), case.num_kv_heads, case.head_dim)
    new = rng.normal(size=shape).astype(problem.q.dtype)
    before, after = store(problem, case, new)
    update = jax.jit(
        ragged_attention_update,
        static_argnames=("implementation", "target"),
        donate_argnums=1,
    )
    out, kv = update(
        NewTokens(*(jnp.asarray(x) for x in (problem.q, new[0], new[1]))),
        jnp.asarray(before),
        jnp.asarray(problem.block_tables),
        runs_of(problem),
        problem.options,
        kv_scales=optional(problem.kv_scales),
        implementation=implementation,
        target=TPU,
    )
    if implementation == "tpu":
        assert_no_races()
    assert_same(kv, after)
    expected = solve(dataclasses.replace(problem, kv=after))
    assert_close(out, expected, TOLERANCE[case.dtype])


@pytest.mark.parametrize("case", [MIXED, EVERYTHING], ids=lambda case: case.name)
def test_equals_float64(case):
    check_attention(case)


def test_update_stores_and_attends():
    check_update(tpu_case("update", (21, 3, 0), (13, 1, 0), num_kv_heads=1))


def test_reference_update_equals_float64():
    check_update(MIXED, implementation="reference")


@pytest.mark.kernels
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name)
def test_matrix_equals_float64(case):
    check_attention(case)


@pytest.mark.kernels
@pytest.mark.parametrize(
    "case", [MIXED, EVERYTHING, *MATRIX], ids=lambda case: case.name
)
def test_matrix_of_updates(case):
    check_update(case)


@pytest.mark.kernels
@settings(max_examples=8)
@given(
    lengths=st.lists(st.sampled_from(TPU_LENGTHS), min_size=4, max_size=4),
    new=st.lists(st.sampled_from([1, 2, 8, 30]), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_any_lengths(lengths, new, seed):
    new = tuple(min(pair) for pair in zip(lengths, new, strict=True))
    check_update(tpu_case("random", tuple(lengths), new), seed)


@pytest.mark.kernels
def test_more_groups_than_buffers():
    """The ring of sublane groups that are written goes round more than once."""
    check_update(tpu_case("many_groups", (150, 70, 9), (145, 1, 9)))


def test_blocks_outside_the_pool_are_not_read():
    problem = make_problem(tpu_case("outside", (9, 17), (3, 1)))
    check_blocks_outside(attend, problem, (-1, 2**31 - 1))


@pytest.mark.kernels
def test_blocks_outside_the_pool_are_not_written():
    problem = make_problem(tpu_case("outside", (9, 17), (9, 12)))
    tables = problem.block_tables.copy()
    tables[:, :3] = [[0, -3, 0], [len(problem.kv), 2, len(problem.kv) + 100]]
    shape = (len(problem.q), 1, 128)
    out, kv = ragged_attention_update(
        NewTokens(jnp.asarray(problem.q), jnp.ones(shape), jnp.ones(shape)),
        jnp.zeros(problem.kv.shape),
        jnp.asarray(tables),
        runs_of(problem),
        problem.options,
        implementation="tpu",
        target=TPU,
    )
    assert_no_races()
    expected = np.zeros(problem.kv.shape)
    expected[0, :, :, :8] = 1  # the first row's positions 0 ... 7
    expected[2, :, :, :8] = 1  # the second's 8 ... 15
    np.testing.assert_array_equal(np.asarray(kv), expected)
    assert np.all(np.isfinite(np.asarray(out)))
