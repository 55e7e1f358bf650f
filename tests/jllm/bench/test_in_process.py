"""`jllm bench throughput`, `latency` and `startup` on the embedded model."""

import json
import sys

import pytest

from jllm.bench import plot
from jllm.bench.latency import fit_line
from jllm.cli import main
from tests.engines import QWEN3

SMALL = (
    *("--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--num-blocks", "128"),
    *("--no-compile-ahead", "--quiet"),
)


@pytest.mark.slow
def test_throughput(tmp_path, capsys):
    """Two engines take turns; the same work is counted for both."""
    result, picture = tmp_path / "result.json", tmp_path / "picture.png"
    arguments = [
        *("--num-prompts", "6", "--random-input-len", "40", "--random-output-len", "5"),
        *("--random-prefix-len", "32", "--num-iters", "1"),
        *("--compare", '{"enable_prefix_caching": false}'),
        *("--json", str(result), "--plot", str(picture), *SMALL),
    ]
    assert main(["bench", "throughput", *arguments]) == 0
    record = json.loads(result.read_text())
    (other,) = record["compared"]
    assert record["total_input_tokens"] == other["total_input_tokens"] == 6 * 72
    assert record["total_output_tokens"] == 30
    # Four rows run at once; who starts later finds the two blocks they share.
    assert record["prefix_hit_rate"] >= 2 * 32 / (6 * 72)
    assert other["prefix_hit_rate"] == 0
    assert record["compilations"] == 0
    assert record["dispatches_per_step"] == 1
    assert 1 <= record["rows_per_step"] <= 4
    assert 0 <= record["padding_share"] < 1
    assert record["mbu"] > 0
    assert record["share_of_serial_limit"] > 0
    assert len(record["timings"]) == 6
    assert {"commit", "machine", "jax", "spread", "workload_hash"} <= set(record)
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "of the serial limit" in printed
    assert "jllm is" in printed


@pytest.mark.slow
def test_random_weights(tmp_path, capsys):
    """A config.json is enough; lines are appended to a .jsonl file."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    lines = tmp_path / "all.jsonl"
    lines.write_text("{}\n")
    arguments = [
        *("--random-weights", str(tmp_path / "config.json"), "--num-iters", "1"),
        *("--batch-size", "2", "--input-len", "8", "20", "--output-len", "4"),
        *("--num-iters-warmup", "0", "--json", str(lines), *SMALL),
    ]
    assert main(["bench", "latency", *arguments]) == 0
    _, text = lines.read_text().splitlines()
    record = json.loads(text)
    assert [r["input_len"] for r in record["results"]] == [8, 20]
    for result in record["results"]:
        assert result["total_output_tokens"] == 8
        assert result["mean_tpot_ms"] > 0
        assert result["decode_mbu"] > 0
        assert result["prefill_mfu"] > 0
    assert len(record["itl_fit_seconds"]) == 2
    assert "x context" in capsys.readouterr().out


def test_fit():
    assert fit_line([(1, 5.0), (2, 7.0), (4, 11.0)]) == pytest.approx((3, 2))
    assert fit_line([(2, 7.0), (2, 9.0)]) == (8, 0)


@pytest.mark.slow
def test_startup(tmp_path, capsys):
    """Processes of their own; the second finds the programs of the first."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    result = tmp_path / "result.json"
    arguments = [
        *("--random-weights", str(tmp_path), "--num-iters-cold", "0"),
        *("--num-iters-warmup", "0", "--num-iters-warm", "1", "--input-len", "4"),
        *("--num-iters-exported", "1", "--json", str(result), *SMALL),
    ]
    assert main(["bench", "startup", *arguments]) == 0
    runs = json.loads(result.read_text())["runs"]
    (warm,), (exported,) = runs["warm"], runs["exported"]
    for run in (warm, exported):
        names = ("imported", "loaded", "first_token", "compiled")
        stages = [run[name] for name in names]
        assert 0 < stages[0] < stages[1] < stages[2] <= stages[3]
    assert exported["programs"] < warm["programs"]
    assert exported["trace_seconds"] < warm["trace_seconds"]
    assert "first token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "VERB"),
        (["unheard"], "unheard"),
        (["throughput", "--unheard"], "--unheard"),
        (["throughput", "--num-prompts", "0"], "num_prompts=0"),
        (["throughput", "--num-iters", "0"], "num_iters=0"),
        (["throughput", "--dataset-name", "azure"], "dataset_path"),
        (["throughput", "--compare", "{"], "--compare"),
        (["throughput", "--compare", '{"wings": 2}'], "wings"),
        (["throughput", "--json", "/nowhere/x.json"], "json='/nowhere/x.json'"),
        (["throughput", "--plot", "x.gif"], "plot='x.gif'"),
        (["throughput", "--model", "a", "--random-weights", "b"], "--random-weights"),
        (["throughput", "--random-weights", "/nowhere"], "/nowhere"),
        (["latency", "--output-len", "0"], "output_len=0"),
        (["latency", "--max-model-len", "0"], "max_model_len=0"),
        (["startup", "--executables", "x"], "chosen by the benchmark"),
        (["startup", "--num-iters-warm", "-1"], "num_iters_warm=-1"),
        (["startup", "--input-len", "0"], "input_len=0"),
    ],
)
def test_bad_flags(capsys, arguments, word):
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("jllm: error: ")
    assert captured.err.count("\n") == 1
    assert word in captured.err


def test_matplotlib_is_missing(monkeypatch, capsys):
    """Said before anything is measured, and which extra brings it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "throughput", "--plot", "x.png"]) == 2
    assert "jllm[plot]" in capsys.readouterr().err


def test_distribution_panel():
    panel = plot.distribution_panel("t", {"a": [0.3, 0.1]})
    assert panel.series == {"a": [(pytest.approx(100), 0.5), (pytest.approx(300), 1.0)]}
