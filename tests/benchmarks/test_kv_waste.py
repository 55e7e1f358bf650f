import dataclasses
import json
import sys

import pytest

from benchmarks import kv_waste
from jllm.config import SchedulerConfig

CONFIG = SchedulerConfig(
    max_num_seqs=8,
    token_budget=256,
    block_size=16,
    num_blocks=512,
    max_model_len=4096,
    max_block_appends=512,
)


def test_waste_stays_below_the_goal():
    figures = kv_waste.replay(CONFIG, kv_waste.synthetic_lengths(12, seed=1))
    assert figures["requests"] == 12
    assert 0 < figures["waste_percent"] < kv_waste.GOAL_PERCENT


def test_waste_is_counted_exactly():
    # 17 tokens need two blocks: 15 of 32 slots are idle; then 14, and so on.
    config = dataclasses.replace(CONFIG, max_num_seqs=1)
    figures = kv_waste.replay(config, [(17, 2)])
    assert figures["waste_percent"] == pytest.approx(
        100 * (15 / 17 + 14 / 18) / 2, abs=0.001
    )


def test_a_trace_is_read_and_the_figures_are_kept(tmp_path, monkeypatch, capsys):
    trace, results = tmp_path / "trace.csv", tmp_path / "results"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nx,374,44\ny,396,109\n")
    arguments = ["--trace", str(trace), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["kv_waste", *arguments])
    kv_waste.main()
    kv_waste.main()
    text = (results / "kv_waste.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["requests"] for line in lines] == [2, 2]
    assert lines[0]["workload"] == "trace.csv"
    assert {"date", "commit", "machine", "python", "config"} <= lines[0].keys()
    assert "waste_percent" in capsys.readouterr().out
