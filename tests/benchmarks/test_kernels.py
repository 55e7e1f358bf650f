"""What times and tunes the kernels, without a device to time them on."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tune
from benchmarks.kernels import run
from benchmarks.kernels.timing import Timing
from pallas_kernels.common.cases import KernelCase
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import try_sizes, tuned_sizes


def doubled(x, implementation, target):
    """An operation with one wrong implementation, whose tile size is tuned."""
    tuned_sizes("fake", target, "any", {"tile": 8, "warps": 4})
    return 2 * x + (0.5 if implementation == "gpu_triton" else 0)


CASE = KernelCase(
    operation="fake",
    name="small",
    function=doubled,
    arguments=(jax.ShapeDtypeStruct((4,), jnp.float32),),
    make_arguments=lambda rng: (rng.normal(size=4).astype(np.float32),),
    num_bytes=4_000,
    num_flops=8_000,
    implementations=("gpu_triton", "blocked"),
)


def test_errors_are_relative_to_the_largest_value():
    expected = (jnp.array([10.0, -20.0]), jnp.array([1.0]))
    assert run.largest_error(expected, expected) == 0
    found = (jnp.array([10.0, -18.0]), jnp.array([1.0]))
    assert run.largest_error(found, expected) == pytest.approx(0.1)
    assert run.largest_error((jnp.array([jnp.nan, -20]), expected[1]), expected) == (
        float("inf")
    )


def test_a_wrong_kernel_is_found():
    cpu = Target("cpu")
    assert run.check(CASE, "blocked", cpu) == 0
    assert run.check(CASE, "gpu_triton", cpu) > 10 * run.tolerance_of(CASE)


def test_figures_are_shares_of_the_limits():
    limit = {"copy_bandwidth": 8e6, "matrix_rate": 4e6}
    found = run.figures(CASE, Timing(1e-3, 9e-4, 2e-3), limit)
    assert found["bytes_per_second"] == pytest.approx(4e6)
    assert found["bandwidth_share"] == pytest.approx(0.5)
    assert found["matrix_share"] == pytest.approx(2.0)


def test_a_kernel_that_fails_is_a_line_with_its_reason(capsys, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(run, "seconds_per_call", fail)
    limit = {"copy_bandwidth": 1.0, "matrix_rate": 1.0}
    lines = run.measure(CASE, argparse.Namespace(peers=False), limit)
    assert [line["implementation"] for line in lines] == ["blocked", "reference"]
    assert {line["failure"] for line in lines} == {"RuntimeError: no such instruction"}
    assert "no such instruction" in capsys.readouterr().out


def test_tuning_goes_downhill_and_stops():
    def seconds(sizes):
        own = sizes["fake", "any"]
        return 1 + abs(own["tile"] - 32) / 32 + abs(own["warps"] - 2)

    start = tune.sizes_in_use(CASE, "blocked", Target("cpu"))
    assert start == {("fake", "any"): {"tile": 8, "warps": 4}}
    best, fastest, first = tune.descend(start, seconds)
    assert best == {("fake", "any"): {"tile": 32, "warps": 2}}
    assert (fastest, first) == (1, 3.75)


def test_wrong_results_are_never_tuned_to():
    found = tune.time_with(CASE, "gpu_triton", Target("cpu"), {})
    assert found == float("inf")
    with try_sizes({("fake", "any"): {"tile": 16}}) as trial:
        doubled(jnp.zeros(1), "blocked", Target("cpu"))
    assert trial.asked["fake", "any"]["tile"] == 16
