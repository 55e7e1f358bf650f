"""The script for a GPU: its trace reader, and parts that fail or hang."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu import models, run
from benchmarks.gpu.trace import device_use, read_trace


def test_overlapping_work_counts_once_and_gaps_are_idle():
    use = device_use([(5e9, 6e9), (0, 2e9), (1e9, 3e9), (1e9, 1.5e9)])
    assert use.launches == 4
    assert use.busy_seconds == pytest.approx(4)
    assert use.span_seconds == pytest.approx(6)
    assert use.idle_share == pytest.approx(1 / 3)
    assert device_use([]).idle_share == 0


def test_a_real_trace_shows_work(tmp_path):
    x = jnp.ones((64, 64))
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(4):
            product(x).block_until_ready()
    use = read_trace(tmp_path)
    assert use.launches >= 4
    assert 0 < use.busy_seconds <= use.span_seconds
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "gigabytes", "kilobytes"),
    [("llama-3.1-8b", 15.01, 128), ("qwen3-0.6b", 1.19, 112)],
)
def test_bytes_of_the_real_shapes(name, gigabytes, kilobytes):
    assert models.weight_bytes(name) / 1e9 == pytest.approx(gigabytes, abs=0.01)
    assert models.kv_bytes(name) == kilobytes * 1024


def test_a_part_that_fails_or_hangs_loses_only_itself(tmp_path, monkeypatch, capsys):
    def plan(folder):
        del folder
        return [
            run.Part("fails", ("json.tool", "none.json"), 20),
            run.Part("hangs", ("http.server", "0"), 1),
            run.Part("works", ("json.tool", "--help"), 20),
        ]

    monkeypatch.setattr(run, "trial_plan", plan)
    assert run.main(["--dry-run", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert '"part": "hangs", "status": "stopped at its limit"' in out
    assert '"part": "works", "status": 0' in out
    assert "usage" in (tmp_path / "works.log").read_text()
    assert len((tmp_path / "summary.jsonl").read_text().splitlines()) == 3


def test_the_full_plan_fits_its_time(tmp_path):
    parts = run.full_plan(tmp_path)
    assert len({part.name for part in parts}) == len(parts)
    assert sum(part.seconds for part in parts) <= 55 * 60
