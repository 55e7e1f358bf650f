"""Thresholds of every implementation against sorted float64 numpy."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common.target import Target
from pallas_kernels.top_p_threshold import top_p_threshold
from pallas_kernels.top_p_threshold.cases import CASES, kernel_cases
from tests.pallas_kernels.targets import gpu_target

TARGETS = {
    "reference": Target("cpu"),
    "blocked": Target("cpu"),
    "gpu_triton": gpu_target(),
    "tpu": Target("tpu", "v6e", "v6e", 1, interpret=pltpu.InterpretParams()),
}
# Share of the total by which a sum of float32 weights may be off.
SLACK = 3e-6


@functools.cache
def jitted(implementation):
    return jax.jit(
        functools.partial(
            top_p_threshold,
            implementation=implementation,
            target=TARGETS[implementation],
        )
    )


def call(implementation, *arrays):
    types = ("float32", "int32", "float32", "float32")
    arrays = [jnp.asarray(a, t) for a, t in zip(arrays, types, strict=True)]
    return np.asarray(jitted(implementation)(*arrays))


def solve(scores, top_k, top_p, temperature):
    """The exact threshold of a row, and what may come of rounded sums."""
    scores = scores.astype(np.float64)
    ordered = np.sort(scores)[::-1]
    best = ordered[0]
    if not np.isfinite(best):
        return -np.inf, [-np.inf]
    kth = ordered[top_k - 1] if 0 < top_k < len(scores) else -np.inf
    if top_p >= 1:
        return kth, [kth]
    ordered = ordered[ordered >= kth]
    sums = np.cumsum(np.exp((ordered - best) / temperature))
    kept, counts = np.unique(ordered, return_counts=True)
    kept = kept[::-1]
    masses = sums[np.cumsum(counts[::-1]) - 1]
    target = np.float64(np.float32(top_p)) * masses[-1]
    slack = SLACK * masses[-1]
    exact = kept[np.argmax(masses >= target)]
    before = np.concatenate([[-np.inf], masses[:-1]])
    possible = kept[(masses >= target - slack) & (before < target + slack)]
    return exact, possible.tolist()


def check(implementation, scores, top_k, top_p, temperature):
    scores = np.asarray(scores, np.float32)
    found = call(implementation, scores, top_k, top_p, temperature)
    assert found.dtype == np.float32
    num_exact = 0
    for row, threshold in enumerate(found):
        exact, possible = solve(
            scores[row], int(top_k[row]), top_p[row], np.float32(temperature[row])
        )
        num_exact += threshold == exact
        assert threshold in possible, (row, threshold, exact)
    return num_exact


def random_rows(num_rows, vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    spread = rng.choice([0.1, 1.0, 3.0, 30.0], (num_rows, 1))
    scores = rng.normal(size=(num_rows, vocab_size)) * spread
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    coarse = rng.random(num_rows) < 0.3
    scores[coarse] = np.rint(scores[coarse] * 2) / 2
    return (
        scores,
        rng.choice([0, 1, 2, 5, 40, vocab_size - 1, vocab_size], num_rows),
        rng.choice([0.01, 0.3, 0.9, 0.95, 0.999, 1.0], num_rows),
        rng.choice([0.05, 0.7, 1.0, 2.0], num_rows),
    )


@pytest.mark.parametrize("implementation", TARGETS)
@pytest.mark.parametrize("case", CASES[1:2], ids=lambda case: case[0])
def test_named_shapes(case, implementation):
    _, num_rows, vocab_size = case
    num_exact = check(implementation, *random_rows(num_rows, vocab_size))
    assert num_exact >= 0.9 * num_rows


@pytest.mark.parametrize("implementation", TARGETS)
def test_difficult_rows(implementation):
    inf = np.inf
    long = np.linspace(-9, 9, 128)
    rows = [
        (np.zeros(128), 3, 0.5, 1.0),
        (np.full(128, -0.0), 0, 0.5, 1.0),
        (np.full(128, -inf), 5, 0.5, 1.0),
        (np.where(np.arange(128) == 7, 2.0, -inf), 5, 0.9, 1.0),
        (np.where(np.arange(128) < 9, long, -inf), 20, 0.9, 1.0),
        (np.where(np.arange(128) < 9, long, -inf), 20, 1.0, 1.0),
        (long, 127, 1.0, 1.0),
        (long, 1, 0.2, 1.0),
        (long, 0, 0.0, 1.0),
        (long * 1e30, 0, 0.9, 1.0),
        (long * 1e-30, 9, 0.9, 1.0),
        (long - 1e6, 0, 0.9, 1.0),
        (long + 1e6, 30, 0.9, 1.0),
        (np.where(long > 0, np.inf, long), 3, 0.9, 1.0),
        (np.where(np.arange(128) < 64, 5.0, -5.0), 64, 0.9, 1.0),
        (np.where(np.arange(128) < 64, 5.0, -5.0), 65, 0.9999, 1.0),
    ]
    check(implementation, *(np.array(column) for column in zip(*rows, strict=True)))


def test_rows_whose_best_parts_do_not_suffice():
    rng = np.random.default_rng(8)
    scores = rng.uniform(-1, 1, (4, 26000)).astype(np.float32)
    scores[3, :5] = 20.0
    top_k, top_p = np.array([5000, 0, 90, 2]), np.array([1.0, 0.3, 1.0, 0.9])
    temperature = np.full(4, 2.0)
    found = call("blocked", scores, top_k, top_p, temperature)
    ordered = np.sort(scores, axis=1)[:, ::-1]
    assert found[0] == ordered[0, 4999]
    assert found[2] == ordered[2, 89]
    assert found[3] == 20.0
    masses = np.cumsum(np.exp(ordered[1].astype(np.float64) / 2))
    first = np.argmax(masses >= np.float32(0.3) * masses[-1])
    assert found[1] in ordered[1, first - 1 : first + 2]


@pytest.mark.parametrize("implementation", TARGETS)
def test_rows_with_nan_keep_everything(implementation):
    scores = np.linspace(-3, 3, 128)[None].repeat(2, axis=0)
    scores[0, 5] = np.nan
    found = call(implementation, scores, [3, 3], [0.9, 1.0], [1.0, 1.0])
    assert not found[0] > -np.inf
    assert found[1] == np.float32(scores[1, -3])


@pytest.mark.parametrize("implementation", ["reference", "blocked", "gpu_triton"])
def test_a_vocabulary_that_no_tile_divides(implementation):
    check(implementation, *random_rows(3, 29001, seed=4))


@pytest.mark.parametrize(
    "implementation",
    [
        "blocked",
        *(
            pytest.param(name, marks=pytest.mark.kernels)
            for name in ("reference", "gpu_triton", "tpu")
        ),
    ],
)
def test_a_row_alone_gets_the_same_threshold(implementation):
    arrays = random_rows(9, 1280, seed=1)
    together = call(implementation, *arrays)
    for row in (0, 4, 8):
        alone = call(implementation, *(a[row : row + 1] for a in arrays))
        assert alone[0] == together[row]


@pytest.mark.kernels
@settings(max_examples=60)
@given(
    num_rows=st.sampled_from([1, 8, 11]),
    vocab_size=st.sampled_from([128, 1152]),
    seed=st.integers(0, 10**6),
)
@pytest.mark.parametrize("implementation", TARGETS)
def test_all(implementation, num_rows, vocab_size, seed):
    check(implementation, *random_rows(num_rows, vocab_size, seed))


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_all_named_shapes(case, implementation):
    check(implementation, *random_rows(*case[1:], seed=5))


@pytest.mark.kernels
@pytest.mark.parametrize("implementation", TARGETS)
def test_large_vocabulary(implementation):
    num_exact = check(implementation, *random_rows(8, 152064, seed=9))
    assert num_exact >= 6


def test_bad_arguments_are_named():
    run = inspect.unwrap(top_p_threshold)
    scores, one = jnp.zeros((2, 8)), jnp.ones(2)
    with pytest.raises(ValueError, match="top_p has shape"):
        run(scores, jnp.ones(2, "int32"), jnp.ones(3), one)
    with pytest.raises(ValueError, match="must be float32"):
        run(scores.astype("bfloat16"), jnp.ones(2, "int32"), one, one)


def test_unsupported_is_said():
    with pytest.raises(NotImplementedError, match="no multiple of 128"):
        call("tpu", np.zeros((1, 100)), [1], [1.0], [1.0])


def test_kernel_cases_are_distinct_and_consistent():
    cases = kernel_cases()
    assert len({case.name for case in cases}) == len(cases)
    arrays = cases[0].make_arguments(np.random.default_rng(0))
    assert [a.shape for a in arrays] == [a.shape for a in cases[0].arguments]
