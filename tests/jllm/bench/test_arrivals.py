"""Arrival times: their statistics with fixed seeds."""

import statistics

import pytest

from jllm.bench.arrivals import Arrivals, arrival_times, trace_times
from jllm.errors import InvalidRequestError


def gaps(times):
    return [b - a for a, b in zip([0.0, *times], times, strict=False)]


def test_burst():
    assert arrival_times(Arrivals(), 3, seed=0) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma(burstiness):
    """The mean is that of the rate; the squared variation is 1 / burstiness."""
    arrivals = Arrivals(request_rate=20, burstiness=burstiness)
    times = arrival_times(arrivals, 20000, seed=1)
    assert times == sorted(times)
    between = gaps(times)
    mean, deviation = statistics.fmean(between), statistics.pstdev(between)
    assert mean == pytest.approx(1 / 20, rel=0.05)
    assert (deviation / mean) ** 2 == pytest.approx(1 / burstiness, rel=0.1)


def test_poisson_counts():
    """In windows of one second the variance of the counts is their mean."""
    times = arrival_times(Arrivals(request_rate=10), 20000, seed=2)
    counts = [0] * (int(times[-1]) + 1)
    for time in times:
        counts[int(time)] += 1
    counts.pop()
    ratio = statistics.pvariance(counts) / statistics.fmean(counts)
    assert ratio == pytest.approx(1, abs=0.1)


def test_seeds():
    arrivals = Arrivals(request_rate=1)
    assert arrival_times(arrivals, 5, 3) == arrival_times(arrivals, 5, 3)
    assert arrival_times(arrivals, 5, 3) != arrival_times(arrivals, 5, 4)


@pytest.mark.parametrize(
    ("strategy", "middle"), [("linear", 50.5), ("exponential", 10)]
)
def test_ramp(strategy, middle):
    """With even arrivals the gaps are the inverse of the rate, from start to end."""
    arrivals = Arrivals(
        burstiness=1e9,
        ramp_up_strategy=strategy,
        ramp_up_start_rps=1,
        ramp_up_end_rps=100,
    )
    between = gaps(arrival_times(arrivals, 101, seed=0))
    assert 1 / between[0] == pytest.approx(1, rel=1e-3)
    assert 1 / between[50] == pytest.approx(middle, rel=1e-3)
    assert 1 / between[100] == pytest.approx(100, rel=1e-3)


def test_trace():
    assert trace_times([5.0, 6.0, 9.0], speed=2) == [0.0, 0.5, 2.0]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"request_rate": 0}, "request_rate=0"),
        ({"request_rate": float("nan")}, "request_rate=nan"),
        ({"burstiness": -1}, "burstiness=-1"),
        ({"burstiness": float("inf")}, "burstiness=inf"),
        ({"ramp_up_strategy": "steep"}, "ramp_up_strategy='steep'"),
        ({"ramp_up_strategy": "linear"}, "ramp_up_start_rps=None"),
        ({"ramp_up_end_rps": 3}, "ramp_up_strategy"),
        (
            {
                "ramp_up_strategy": "linear",
                "ramp_up_start_rps": 1,
                "ramp_up_end_rps": 2,
                "request_rate": 3,
            },
            "request_rate=3",
        ),
    ],
)
def test_bad_arrivals(fields, word):
    with pytest.raises(InvalidRequestError, match=word):
        Arrivals(**fields)
