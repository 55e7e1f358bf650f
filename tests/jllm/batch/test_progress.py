"""What a job shows of itself while it runs."""

import io

import pytest

from jllm.batch import Answer, Progress, progress


def test_speed_and_cost(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress(10, is_shown=False, price_per_hour=3.6) as shown:
        assert shown.dollars_per_million is None
        shown.begin()
        shown.update(Answer({}, num_prompt_tokens=600, num_output_tokens=400))
        now += 2
        # 2 seconds at a tenth of a cent each, for a thousand tokens.
        assert shown.dollars_per_million == pytest.approx(2.0)
        assert shown.speed == "300 prompt and 200 output tokens/s, $2 per million"


def test_the_bar_counts_lines_that_were_done_before(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    with Progress(4, is_shown=True) as shown:
        shown.begin()
        shown.skip(3)
        shown.update(Answer({}, num_prompt_tokens=1, num_output_tokens=1))
    assert "4/4" in written.getvalue()
    assert "output tokens/s" in written.getvalue()
    assert "million" not in written.getvalue()
