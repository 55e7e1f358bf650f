"""The prefill kernel for Hopper in the simulator, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.cases import AttentionCase, make_problem, solve
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.ragged_attention.gpu_mosaic import ragged_attention_gpu_mosaic
from tests.pallas_kernels.mosaic_simulator import simulated, simulator
from tests.pallas_kernels.paged_cache import (
    H200,
    MOSAIC_HEADS,
    TOLERANCE,
    assert_close,
    check_blocks_outside,
)

SMALL = (
    AttentionCase("mixed", (300, 0, 1, 40), (40, 0, 1, 9), **MOSAIC_HEADS),
    AttentionCase(
        "everything",
        (150, 33),
        (34, 20),
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
        "edges", (1, 15, 16, 17, 63, 64, 65), (1, 15, 3, 17, 9, 2, 1), **MOSAIC_HEADS
    ),
    AttentionCase("long_prefix", (3000,), (5,), **MOSAIC_HEADS),
    AttentionCase("groups_of_7", (700, 9), (70, 2), 7, 1, 128, 32, "float16"),
    AttentionCase("no_groups", (200,), (130,), 2, 2, 64, 16, "float16"),
    AttentionCase("width_256", (200,), (40,), 4, 1, 256, 16, "bfloat16"),
    AttentionCase("blocks_of_8", (100, 7), (20, 7), 4, 1, 64, 8, "bfloat16"),
    AttentionCase("blocks_of_128", (300, 7), (30, 7), 4, 1, 64, 128, "bfloat16"),
    AttentionCase("blocks_of_256", (300, 7), (30, 7), 4, 1, 64, 256, "bfloat16"),
    AttentionCase("more_tiles_than_stages", (700,), (4,), window=600, **WIDE),
    AttentionCase("window_of_one", (5, 200), (5, 40), window=1, **MOSAIC_HEADS),
    AttentionCase("window", (5, 16, 700), (1, 16, 40), window=16, **MOSAIC_HEADS),
    AttentionCase("soft_cap", (60, 200), (7, 1), soft_cap=2.0, **MOSAIC_HEADS),
    AttentionCase("sinks", (1, 200), (1, 40), has_sinks=True, **MOSAIC_HEADS),
    AttentionCase("alibi", (60, 200), (7, 40), has_alibi=True, **MOSAIC_HEADS),
    AttentionCase("shared_blocks", (70, 64), (5, 1), shared_blocks=3, **MOSAIC_HEADS),
)


def check(case, monkeypatch, kv_dtype=None):
    problem = make_problem(case)
    kv = problem.kv if kv_dtype is None else problem.kv.view(kv_dtype)

    def attend(*arrays):
        return ragged_attention_gpu_mosaic(
            *arrays, problem.options, None, target=simulated()
        )

    tables = (problem.block_tables, problem.row_starts, problem.lengths)
    with simulator(monkeypatch):
        out = jax.jit(attend)(*map(jnp.asarray, (problem.q, kv, *tables)))
        out = np.asarray(out, np.float64)
    assert_close(out, solve(problem), TOLERANCE[case.dtype])


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_equals_float64(case, monkeypatch):
    check(case, monkeypatch)


@pytest.mark.kernels
@pytest.mark.parametrize("case", MANY, ids=lambda case: case.name)
def test_all_cases_equal_float64(case, monkeypatch):
    check(case, monkeypatch)


@pytest.mark.kernels
def test_blocks_outside_the_pool_are_not_read(monkeypatch):
    problem = make_problem(AttentionCase("bad", (60, 33), (5, 33), **MOSAIC_HEADS))

    @jax.jit
    def attend(*arrays):
        return ragged_attention_gpu_mosaic(
            *arrays, problem.options, None, target=simulated()
        )

    def run(each):
        tables = (each.block_tables, each.row_starts, each.lengths)
        return np.asarray(attend(*map(jnp.asarray, (each.q, each.kv, *tables))))

    with simulator(monkeypatch):
        check_blocks_outside(run, problem)


@pytest.mark.kernels
def test_cache_of_bits(monkeypatch):
    check(
        AttentionCase("bits", (60, 7), (3, 7), **MOSAIC_HEADS), monkeypatch, np.uint16
    )


@pytest.mark.parametrize(
    ("num_heads", "dtype", "generation", "word"),
    [
        (4, "bfloat16", "sm_100", "sm_90"),
        (4, "float32", "sm_90", "queries"),
        (129, "bfloat16", "sm_90", "129"),
    ],
)
def test_what_is_not_supported_is_named(num_heads, dtype, generation, word):
    with pytest.raises(NotImplementedError, match=word):
        ragged_attention_gpu_mosaic(
            jnp.zeros((2, num_heads, 64), dtype),
            jnp.zeros((2, 2, 1, 16, 64), dtype),
            jnp.zeros((1, 1), jnp.int32),
            jnp.array([0, 2], jnp.int32),
            jnp.array([2], jnp.int32),
            ScoreOptions(1.0),
            None,
            target=Target("gpu", generation, "", 132),
        )


def test_lowers_for_cuda():
    case = AttentionCase(
        "lower", (600,), (40,), has_sinks=True, has_alibi=True, **MOSAIC_HEADS
    )
    problem = make_problem(case)

    def attend(*arrays):
        return ragged_attention_gpu_mosaic(*arrays, problem.options, None, target=H200)

    tables = (problem.block_tables, problem.row_starts, problem.lengths)
    arrays = map(jnp.asarray, (problem.q, problem.kv, *tables))
    text = jax.jit(attend).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
