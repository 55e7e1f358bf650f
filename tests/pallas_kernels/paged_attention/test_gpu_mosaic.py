"""The decode kernel for Hopper in the simulator, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.cases import AttentionCase, make_problem, solve
from pallas_kernels.common.mosaic_attention import MosaicTiles
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.paged_attention.gpu_mosaic import (
    default_sizes,
    paged_attention_gpu_mosaic,
    split_keys,
)
from tests.pallas_kernels.mosaic_simulator import simulated, simulator
from tests.pallas_kernels.paged_cache import (
    H200,
    MOSAIC_HEADS,
    TOLERANCE,
    assert_close,
    check_blocks_outside,
)

SMALL = (
    AttentionCase("split", (600, 0), (1, 0), **MOSAIC_HEADS),
    AttentionCase(
        "everything",
        (1, 75),
        (3, 3),
        window=20,
        soft_cap=3.0,
        has_sinks=True,
        has_alibi=True,
        **MOSAIC_HEADS,
    ),
)
WIDE = {**MOSAIC_HEADS, "head_dim": 128}
MANY = (
    AttentionCase(
        "edges", (1, 15, 16, 17, 63, 64, 65, 0), (1,) * 7 + (0,), **MOSAIC_HEADS
    ),
    AttentionCase("long_and_short", (3000, 5), (1, 1), **MOSAIC_HEADS),
    AttentionCase("two_kv_heads", (70,), (1,), 6, 2, 64, 16, "float16"),
    AttentionCase("width_128", (200,), (1,), 8, 1, 128, 16, "float16"),
    AttentionCase("width_256", (200,), (1,), 2, 1, 256, 16, "bfloat16"),
    AttentionCase("blocks_of_8", (100, 7), (1, 1), 4, 1, 64, 8, "bfloat16"),
    AttentionCase("blocks_of_128", (300, 7), (1, 1), 4, 1, 64, 128, "bfloat16"),
    AttentionCase("more_tiles_than_stages", (1500,), (1,), window=1400, **WIDE),
    AttentionCase("window_of_one", (5, 200), (1, 1), window=1, **MOSAIC_HEADS),
    AttentionCase("window", (5, 16, 17, 700), (1,) * 4, window=16, **MOSAIC_HEADS),
    AttentionCase("soft_cap", (60, 200), (1, 1), soft_cap=2.0, **MOSAIC_HEADS),
    AttentionCase("sinks", (1, 200, 0), (1, 1, 0), has_sinks=True, **MOSAIC_HEADS),
    AttentionCase("alibi", (60, 200), (1, 1), has_alibi=True, **MOSAIC_HEADS),
    AttentionCase("verify", (2, 33, 200), (4, 4, 4), **MOSAIC_HEADS),
    AttentionCase(
        "shared_blocks", (70, 64, 100), (1,) * 3, shared_blocks=3, **MOSAIC_HEADS
    ),
)


def check(case, monkeypatch, num_cores=1, kv_dtype=None):
    # Tokens before position 0 are not in the oracle's problem.
    new = tuple(
        min(count, length)
        for count, length in zip(case.num_new, case.lengths, strict=True)
    )
    num_new = max(case.num_new)
    problem = make_problem(
        AttentionCase(**{**fields(case), "num_new": new}), num_padding=0
    )
    shape = (len(new), num_new, *problem.q.shape[1:])
    q, expected = np.zeros(shape, problem.q.dtype), np.zeros(shape)
    solved = solve(problem)
    for row, count in enumerate(new):
        tokens = slice(problem.row_starts[row], problem.row_starts[row + 1])
        q[row, num_new - count :] = problem.q[tokens]
        expected[row, num_new - count :] = solved[tokens]
    kv = problem.kv if kv_dtype is None else problem.kv.view(kv_dtype)

    def attend(*arrays):
        return paged_attention_gpu_mosaic(
            *arrays, problem.options, None, target=simulated(num_cores)
        )

    arrays = (q, kv, problem.block_tables, problem.lengths)
    with simulator(monkeypatch):
        out = jax.jit(attend)(*map(jnp.asarray, arrays))
        out = np.asarray(out, np.float64)
    assert_close(out, expected, TOLERANCE[case.dtype])


def fields(case):
    return {name: getattr(case, name) for name in case.__dataclass_fields__}


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_equals_float64(case, monkeypatch):
    check(case, monkeypatch)


@pytest.mark.kernels
@pytest.mark.parametrize("case", MANY, ids=lambda case: case.name)
def test_all_cases_equal_float64(case, monkeypatch):
    check(case, monkeypatch, num_cores=2)


@pytest.mark.kernels
def test_blocks_outside_the_pool_are_not_read(monkeypatch):
    case = AttentionCase("outside", (60, 33), (1, 1), **MOSAIC_HEADS)
    problem = make_problem(case, num_padding=0)

    @jax.jit
    def attend(*arrays):
        return paged_attention_gpu_mosaic(
            *arrays, problem.options, None, target=simulated()
        )

    def run(each):
        arrays = (each.q[:, None], each.kv, each.block_tables, each.lengths)
        return np.asarray(attend(*map(jnp.asarray, arrays)))

    with simulator(monkeypatch):
        check_blocks_outside(run, problem)


@pytest.mark.kernels
def test_cache_of_bits(monkeypatch):
    case = AttentionCase("bits", (60, 7), (1, 1), **MOSAIC_HEADS)
    check(case, monkeypatch, kv_dtype=np.uint16)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("num_items", [1, 7, 200])
def test_items_cover_the_keys_once(num_items, window):
    tiles = tiles_of(window)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        lengths = rng.choice([0, 1, 63, 64, 65, 513, 5000, 70000], size=5)
        plan = split_keys(jnp.asarray(lengths, jnp.int32), num_items, 512, tiles)
        items, rows = np.asarray(plan.items), np.asarray(plan.rows)
        used = rows[:, 1].sum()
        assert (items[used:, 1] == items[used:, 2]).all()
        for row, length in enumerate(lengths):
            first, count = rows[row]
            mine = items[first : first + count]
            assert (mine[:, 0] == row).all()
            assert (mine[:, 3] == length).all()
            seen = [key for _, begin, end, _ in mine for key in range(begin, end)]
            least = 0 if window is None else max(length - window, 0)
            assert seen == list(range(least // 16 * 16, length))
            assert all((mine[:-1, 2] - mine[:-1, 1]) % tiles.block_n == 0)


def tiles_of(window):
    q, kv = jnp.zeros((1, 1, 4, 64), jnp.bfloat16), jnp.zeros((1, 2, 1, 16, 64))
    options = ScoreOptions(1.0, window=window)
    return MosaicTiles.of(q, kv, options, default_sizes(64), tokens=1, target=H200)


@pytest.mark.parametrize(
    ("q", "kv", "target", "word"),
    [
        (
            ((1, 1, 4, 64), "bfloat16"),
            ((2, 2, 1, 16, 64), "bfloat16"),
            "sm_100",
            "sm_90",
        ),
        (
            ((1, 1, 4, 80), "bfloat16"),
            ((2, 2, 1, 16, 80), "bfloat16"),
            "sm_90",
            "width",
        ),
        (
            ((1, 1, 4, 64), "float32"),
            ((2, 2, 1, 16, 64), "float32"),
            "sm_90",
            "queries",
        ),
        (((1, 1, 4, 64), "bfloat16"), ((2, 2, 1, 16, 64), "int8"), "sm_90", "cache"),
        (
            ((1, 1, 4, 64), "bfloat16"),
            ((2, 2, 1, 4, 64), "bfloat16"),
            "sm_90",
            "places",
        ),
        (((1, 17, 4, 64), "bfloat16"), ((2, 2, 1, 16, 64), "bfloat16"), "sm_90", "68"),
    ],
)
def test_what_is_not_supported_is_named(q, kv, target, word):
    tables, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    arrays = (jnp.zeros(*q), jnp.zeros(*kv), tables, lengths)
    scales = jnp.ones((2, 1)) if kv[1] == "int8" else None
    with pytest.raises(NotImplementedError, match=word):
        paged_attention_gpu_mosaic(
            *arrays, ScoreOptions(1.0), scales, target=Target("gpu", target, "", 132)
        )


def test_only_the_simulator_interprets():
    q, kv = jnp.zeros((1, 1, 4, 64), jnp.bfloat16), jnp.zeros((2, 2, 1, 16, 64))
    tables, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    target = Target("gpu", "sm_90", "h200", 132, interpret=True)
    with pytest.raises(NotImplementedError, match="simulator"):
        paged_attention_gpu_mosaic(
            q, kv, tables, lengths, ScoreOptions(1.0), None, target=target
        )


def test_lowers_for_cuda():
    case = AttentionCase(
        "lower", (600,), (1,), has_sinks=True, has_alibi=True, **MOSAIC_HEADS
    )
    problem = make_problem(case, num_padding=0)

    def attend(*arrays):
        return paged_attention_gpu_mosaic(*arrays, problem.options, None, target=H200)

    arrays = (problem.q[:, None], problem.kv, problem.block_tables, problem.lengths)
    traced = jax.jit(attend).trace(*map(jnp.asarray, arrays))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 2
