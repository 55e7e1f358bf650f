"""The definitions, on times that are computed by hand."""

import math

import pytest

from jllm.bench.statistics import (
    RequestTiming,
    distribution,
    is_good,
    itls_beside_prefill,
    parse_goodput,
    percentile,
    spread,
    summarize,
)
from jllm.errors import InvalidRequestError


def timing(start, *chunks, scheduled=None, prompt=10, output=None, **fields):
    return RequestTiming(
        num_prompt_tokens=prompt,
        num_output_tokens=len(chunks) if output is None else output,
        scheduled=start if scheduled is None else scheduled,
        start=start,
        first_token=chunks[0] if chunks else None,
        end=chunks[-1] if chunks else start,
        chunk_times=chunks,
        **fields,
    )


def test_one_request():
    one = timing(10.0, 10.5, 10.6, 10.9, scheduled=9.0)
    assert one.ttft == pytest.approx(0.5)
    assert one.ttft_from_schedule == pytest.approx(1.5)
    assert one.itls == pytest.approx([0.1, 0.3])
    assert one.e2el == pytest.approx(0.9)
    assert one.tpot == pytest.approx(0.2)


def test_one_token_has_no_tpot():
    one = timing(0.0, 0.25)
    assert one.tpot is None
    assert one.itls == []
    figures = summarize([one])
    assert "mean_tpot_ms" not in figures
    assert "mean_itl_ms" not in figures
    assert figures["mean_ttft_ms"] == pytest.approx(250)


def test_chunks_of_several_tokens():
    """The ITL counts chunks, TPOT and the ITL per token count tokens."""
    one = timing(0.0, 1.0, 2.0, 3.0, output=6)
    figures = summarize([one])
    assert figures["mean_itl_ms"] == pytest.approx(1000)
    assert figures["mean_itl_per_token_ms"] == pytest.approx(500)
    assert figures["mean_tpot_ms"] == pytest.approx(2000 / 5)


def test_rates_and_duration():
    """From the first start to the last end, failed requests included in neither sum."""
    figures = summarize(
        [
            timing(1.0, 2.0, 3.0, prompt=100),
            timing(2.0, 4.0, 5.0, prompt=50),
            timing(2.5, prompt=7, error="HTTP 500"),
        ]
    )
    assert figures["duration"] == pytest.approx(4.0)
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert figures["errors"] == {"HTTP 500": 1}
    assert figures["total_input_tokens"] == 150
    assert figures["total_output_tokens"] == 4
    assert figures["request_throughput"] == pytest.approx(0.5)
    assert figures["output_throughput"] == pytest.approx(1.0)
    assert figures["total_token_throughput"] == pytest.approx(154 / 4)
    assert figures["mean_e2el_ms"] == pytest.approx(2500)


def test_nothing_completed():
    figures = summarize([timing(1.0, error="refused")])
    assert figures["completed"] == 0
    assert "request_throughput" not in figures
    assert summarize([])["duration"] == 0


def test_percentiles():
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == pytest.approx(2.5)
    assert percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert math.isnan(percentile([], 50))
    figures = distribution([1.0, 2.0, 3.0, 4.0], [25])
    assert figures == {
        "mean": 2.5,
        "median": 2.5,
        "std": pytest.approx(math.sqrt(1.25)),
        "p25": pytest.approx(1.75),
        "max": 4.0,
    }
    assert spread([1.0, 2.0, 4.0]) == pytest.approx(1.5)


def test_goodput():
    """All limits have to be kept; one token has a TPOT of zero; failures are bad."""
    limits = parse_goodput(["ttft:500", "tpot:100"])
    assert limits == {"ttft": 500.0, "tpot": 100.0}
    assert is_good(timing(0.0, 0.5, 0.6), limits)
    assert not is_good(timing(0.0, 0.51, 0.6), limits)
    assert not is_good(timing(0.0, 0.5, 0.7), limits)
    assert is_good(timing(0.0, 0.4), limits)
    assert not is_good(timing(0.0, 0.1, error="broken"), limits)
    assert not is_good(timing(0.0, 0.1, 0.12), {"e2el": 100.0})
    figures = summarize(
        [timing(0.0, 0.5, 0.6), timing(0.0, 0.6, 2.0), timing(0.0, error="x")],
        goodput=limits,
    )
    assert figures["request_goodput"] == pytest.approx(1 / 2.0)
    assert figures["good_share"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("entry", ["ttft", "ttft:", "ttft:-1", "itl:5", "tpot:nan"])
def test_bad_goodput(entry):
    with pytest.raises(InvalidRequestError, match="goodput"):
        parse_goodput([entry])


def test_itl_beside_a_prefill():
    """Only gaps that overlap the wait of another request for its first token."""
    running = timing(0.0, 0.1, 0.2, 0.9, 1.0, 1.1)
    arriving = timing(0.3, 0.8, 1.05)
    found = itls_beside_prefill([running, arriving])
    assert found == pytest.approx([0.7])
    figures = summarize([running, arriving])
    assert figures["max_itl_beside_prefill_ms"] == pytest.approx(700)


def test_prefix_hits():
    figures = summarize(
        [
            timing(0.0, 1.0, prompt=30, num_cached_tokens=16),
            timing(0.0, 1.0, prompt=10, num_cached_tokens=0),
            timing(0.0, 1.0, prompt=99),
        ]
    )
    assert figures["total_cached_tokens"] == 16
    assert figures["prefix_hit_rate"] == pytest.approx(0.4)
