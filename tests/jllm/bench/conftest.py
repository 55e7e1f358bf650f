"""Limits are measured in a moment, on sizes that mean nothing."""

import pytest

from jllm.bench.limits import measure_limits


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch):
    monkeypatch.setattr("jllm.bench.limits.READ_BYTES", {"cpu": 2**22})
    monkeypatch.setattr("jllm.bench.limits.MATRIX_SIZE", {"cpu": 64})
    measure_limits.cache_clear()
    yield
    measure_limits.cache_clear()
