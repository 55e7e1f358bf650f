"""Prefill attention on TPUs, interpreted: memory of NaN, late DMA, races detected."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.cases import AttentionCase, make_problem, solve
from pallas_kernels.common.kv_update import NewTokens
from pallas_kernels.common.target import Target
from pallas_kernels.ragged_attention import tiles, tpu
from pallas_kernels.ragged_attention.api import ragged_attention
from pallas_kernels.ragged_attention.update import ragged_attention_update

INTERPRET = pltpu.InterpretParams(
    detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan"
)
TARGET = Target("tpu", "v6e", "v6e", 1, interpret=INTERPRET)
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1e-3}
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def make_case(name, lengths, num_new, **fields):
    """A small case with the head width of a register."""
    small = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "block_size": 8}
    return AttentionCase(name, lengths, num_new, **{**small, **fields})


MIXED = make_case("mixed", (1, 7, 25, 40, 0, 13), (1, 7, 9, 1, 0, 13))
EVERYTHING = make_case(
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
    make_case("one_prompt", (37,), (37,)),
    make_case("chunk_after_prefix", (200,), (30,)),
    make_case("single_tokens", (9, 33, 1), (1, 1, 1)),
    make_case("all_empty", (0, 0), (0, 0)),
    make_case("two_kv_heads", (20, 9), (20, 2), num_heads=4, num_kv_heads=2),
    make_case("groups_of_7", (20, 9), (20, 2), num_heads=14, num_kv_heads=2),
    make_case("many_kv_heads", (20, 9), (7, 2), num_heads=10, num_kv_heads=10),
    make_case("width_256", (20, 9), (20, 2), head_dim=256),
    make_case("blocks_of_128", (300, 9), (20, 2), block_size=128),
    make_case("bfloat16", (60, 20), (30, 20), dtype="bfloat16", block_size=16),
    make_case(
        "float16",
        (60, 20),
        (30, 2),
        dtype="float16",
        kv_dtype="bfloat16",
        block_size=16,
    ),
    make_case(
        "float32_over_bfloat16", (60,), (30,), kv_dtype="bfloat16", block_size=16
    ),
    *(
        make_case(name, (60, 20), (30, 2), kv_dtype=name, block_size=32)
        for name in ("int8", "float8_e4m3fn", "float8_e5m2")
    ),
    make_case("window", (70, 33), (30, 33), window=9),
    make_case("window_of_one", (70, 9), (20, 9), window=1),
    make_case("soft_cap", (70, 9), (20, 9), soft_cap=2.0),
    make_case("sinks", (70, 9), (20, 9), has_sinks=True),
    make_case("alibi", (70, 9), (20, 9), has_alibi=True),
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


def optional(array):
    return None if array is None else jnp.asarray(array)


def assert_no_races():
    assert not interpret_pallas_call.races.races_found


def assert_close(out, expected, case):
    tolerance = TOLERANCE[case.dtype]
    np.testing.assert_allclose(
        np.asarray(out, np.float64), expected, atol=tolerance, rtol=tolerance
    )


def check_attention(case, seed=0):
    problem = make_problem(case, seed)
    out = jax.jit(ragged_attention, static_argnames=("implementation", "target"))(
        jnp.asarray(problem.q),
        jnp.asarray(problem.kv),
        jnp.asarray(problem.block_tables),
        jnp.asarray(problem.row_starts),
        jnp.asarray(problem.lengths),
        problem.options,
        kv_scales=optional(problem.kv_scales),
        implementation="tpu",
        target=TARGET,
    )
    assert_no_races()
    assert_close(out, solve(problem), case)


def assert_same(kv, expected):
    """Float32 holds all values of a cache, and numpy knows its NaN."""
    np.testing.assert_array_equal(
        np.asarray(kv).astype(np.float32), expected.astype(np.float32)
    )


def store(problem, case, new):
    """The pool without the new tokens, and with them; by numpy."""
    before, after = problem.kv.copy(), problem.kv.copy()
    garbage = 127 if before.dtype == np.int8 else np.nan
    stored = new.astype(np.float32)
    if problem.kv_scales is not None:
        stored = stored / problem.kv_scales[:, None, :, None]
    if before.dtype == np.int8:
        stored = np.clip(np.rint(stored), -128, 127)
    elif case.kv_dtype in LARGEST:
        largest = LARGEST[case.kv_dtype]
        stored = np.clip(stored, -largest, largest)
    for row, length in enumerate(case.lengths):
        first, last = problem.row_starts[row : row + 2]
        for token in range(max(first, last - length), last):
            run, place = divmod(length - (last - token), case.block_size)
            block = problem.block_tables[row, run]
            before[block, :, :, place] = garbage
            after[block, :, :, place] = stored[:, token].astype(after.dtype)
    return before, after


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
        jnp.asarray(problem.row_starts),
        jnp.asarray(problem.lengths),
        problem.options,
        kv_scales=optional(problem.kv_scales),
        implementation=implementation,
        target=TARGET,
    )
    if implementation == "tpu":
        assert_no_races()
    assert_same(kv, after)
    assert_close(out, solve(dataclasses.replace(problem, kv=after)), case)


@pytest.mark.parametrize("case", [MIXED, EVERYTHING], ids=lambda case: case.name)
def test_equals_float64(case):
    check_attention(case)


def test_update_stores_and_attends():
    check_update(make_case("update", (21, 3, 0), (13, 1, 0), num_kv_heads=1))


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
    lengths=st.lists(
        st.sampled_from([0, 1, 7, 8, 9, 15, 16, 17, 40]), min_size=4, max_size=4
    ),
    new=st.lists(st.sampled_from([1, 2, 8, 30]), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_any_lengths(lengths, new, seed):
    new = tuple(min(pair) for pair in zip(lengths, new, strict=True))
    check_update(make_case("random", tuple(lengths), new), seed)


@pytest.mark.kernels
def test_more_groups_than_buffers():
    """The ring of sublane groups that are written goes round more than once."""
    check_update(make_case("many_groups", (150, 70, 9), (145, 1, 9)))


@pytest.mark.kernels
def test_blocks_outside_the_pool_are_not_written():
    problem = make_problem(make_case("outside", (9, 17), (9, 12)))
    tables = problem.block_tables.copy()
    tables[:, :3] = [[0, -3, 0], [len(problem.kv), 2, len(problem.kv) + 100]]
    shape = (len(problem.q), 1, 128)
    out, kv = ragged_attention_update(
        NewTokens(jnp.asarray(problem.q), jnp.ones(shape), jnp.ones(shape)),
        jnp.zeros(problem.kv.shape),
        jnp.asarray(tables),
        jnp.asarray(problem.row_starts),
        jnp.asarray(problem.lengths),
        problem.options,
        implementation="tpu",
        target=TARGET,
    )
    assert_no_races()
    expected = np.zeros(problem.kv.shape)
    expected[0, :, :, :8] = 1  # the first row's positions 0 ... 7
    expected[2, :, :, :8] = 1  # the second's 8 ... 15
    np.testing.assert_array_equal(np.asarray(kv), expected)
    assert np.all(np.isfinite(np.asarray(out)))
