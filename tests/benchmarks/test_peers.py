"""The comparison with other engines, on engines that only say what they are told."""

import json
import pathlib
import stat
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import record
from benchmarks.peers import checkpoints, compare, gguf_file, llamacpp, protocol
from benchmarks.peers.worker import ADAPTERS

ENGINE = """#!{python}
import json, sys, time
name = sys.argv[3]
if name == "vllm":
    print(json.dumps({{"missing": "No module named 'vllm'"}}))
    sys.exit()
if name == "openvino":
    sys.exit(3)
print(json.dumps({{"ready": "1.0", "seconds": 0}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    seconds = 0.02 if name == "jllm" else 0.06
    time.sleep(seconds)
    tokens = [[p[0]] * n for p, n in zip(request["prompts"], request["lengths"])]
    if name == "llamacpp":
        tokens[-1][-1] = -1
    nothing = [None] * len(tokens)
    answer = {{"seconds": seconds, "tokens": tokens, "first": [0.01] * len(tokens)}}
    answer |= {{"end": nothing, "cached": [4] * len(tokens)}}
    print(json.dumps(answer), flush=True)
"""
TINY = {
    **checkpoints.CONFIGS["llama-120m"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write_checkpoint(TINY, tmp_path / "tiny")


@pytest.fixture
def run(tmp_path, folder, monkeypatch, capsys):
    """Runs the comparison with stand-ins; returns its rows and what it printed."""
    engine = tmp_path / "python"
    engine.write_text(ENGINE.format(python=sys.executable))
    engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(compare, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record.append, "__defaults__", (tmp_path / "results",))

    def run(peers, *arguments):
        pythons = [
            word
            for name in peers.split(",")
            for word in ("--peer-python", f"{name}={engine}")
        ]
        monkeypatch.setattr(
            sys,
            "argv",
            [
                *("compare", "--model", str(folder), "--cache", str(tmp_path)),
                *("--peers", peers, *pythons, "--record", *arguments),
            ],
        )
        compare.main()
        return record.read("peers"), capsys.readouterr().out

    return run


def test_engines_take_turns(run):
    rows, printed = run(
        *("transformers,jllm,llamacpp", "--requests", "1", "3", "--rounds", "2"),
        *("--random-input-len", "8", "--random-output-len", "3"),
    )
    assert [(r["engine"], r["requests"]) for r in rows] == [
        ("jllm", 1),
        ("transformers", 1),
        ("llamacpp", 1),
        ("jllm", 3),
        ("transformers", 3),
        ("llamacpp", 3),
    ]
    ours, other, wrong = rows[3:]
    assert ours["output_tokens_per_second"] == pytest.approx(9 / 0.02)
    assert other["jllm_is_faster_by"] == pytest.approx(3)
    assert (ours["jllm_is_faster_by"], ours["rounds"]) == (1, 2)
    assert other["same_tokens"] == 1
    assert wrong["same_tokens"] == pytest.approx(2 / 3, abs=0.01)
    assert ours["prefix_hit_rate"] == 0.5
    assert ours["median_ttft_ms"] == 10
    assert ours["foreign_cores"] >= 0
    assert ours["rss_mb"] > 1
    assert {"commit", "machine", "spread", "workload_hash", "version"} <= set(ours)
    assert rows[0]["workload_hash"] != rows[3]["workload_hash"]
    assert "3 x random 8/3" in printed


def test_missing_and_broken_engines_are_left_out(run):
    rows, printed = run(
        *("jllm,vllm,openvino", "--requests", "1", "--rounds", "1"),
        *("--random-input-len", "8", "--random-output-len", "3"),
    )
    assert [r["engine"] for r in rows] == ["jllm"]
    assert "vllm: left out, No module named 'vllm'" in printed
    assert "openvino: left out, openvino ended with 3" in printed


def test_time_limit(run):
    """No further round starts; what was measured is kept."""
    rows, _ = run(
        *("jllm", "--requests", "1", "--rounds", "50", "--time-limit", "0.3"),
        *("--random-input-len", "8", "--random-output-len", "3"),
    )
    assert 1 <= rows[0]["rounds"] < 50


def test_every_adapter_is_there():
    """Without the engine it says so, by name; it imports nothing of it before."""
    for module in ADAPTERS.values():
        path = pathlib.Path(compare.__file__).parent / f"{module}.py"
        assert "def open_peer(" in path.read_text()
    settings = protocol.Settings("f", "float32", 1, 1, 8, "c")
    for name in ("vllm", "sglang_jax", "openvino", "llamacpp"):
        module = __import__(f"benchmarks.peers.{name}", fromlist=["open_peer"])
        with pytest.raises(protocol.NotInstalledError):
            module.open_peer(settings)


def test_too_few_tokens_are_an_error():
    assert protocol.cut([1, 2], 2) == [1, 2]
    with pytest.raises(RuntimeError, match="2 tokens instead of 3"):
        protocol.cut([1, 2], 3)


def test_shared_start():
    assert llamacpp.shared([1, 2, 3], [1, 2, 4, 5]) == 2
    assert llamacpp.shared([1, 2], [1, 2, 3]) == 2
    assert llamacpp.shared([], [1]) == 0


def test_checkpoint_is_what_it_says(folder):
    """bfloat16 tensors in Hugging Face's names; written once."""
    tensors = dict(gguf_file.tensors(folder))
    assert {name: values.shape for name, values in tensors.items()} == (
        checkpoints.shapes(TINY)
    )
    assert np.all(tensors["model.norm.weight"] == 1)
    gate = tensors["model.layers.0.mlp.gate_proj.weight"]
    assert np.std(gate) == pytest.approx(8**-0.5, rel=0.3)
    assert gate.dtype == np.float32
    assert not np.any(gate.view(np.uint32) & 0xFFFF)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    checkpoints.write_checkpoint(TINY, folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("name", "millions", "read"), [("llama-120m", 124.7, 100), ("qwen3-0.6b", 596, 596)]
)
def test_sizes(name, millions, read):
    config = checkpoints.CONFIGS[name]
    shapes = checkpoints.shapes(config)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    assert total == pytest.approx(millions * 1e6, rel=0.01)
    cost = compare.ModelCost.from_config(config, "bfloat16")
    assert cost.weight_bytes == pytest.approx(2e6 * read, rel=0.01)


def test_gguf_names():
    assert gguf_file.gguf_name("lm_head.weight") == "output.weight"
    name = "model.layers.11.self_attn.q_proj.weight"
    assert gguf_file.gguf_name(name) == "blk.11.attn_q.weight"
    for name in checkpoints.shapes(checkpoints.CONFIGS["qwen3-0.6b"]):
        assert gguf_file.gguf_name(name).endswith(".weight")


def test_interleaved_rows():
    """Row i of the first half of a head is followed by row i of the second half."""
    weight = np.arange(8)[:, None] * np.ones(3)
    rows = gguf_file.interleaved(weight, 2)[:, 0].tolist()
    assert rows == [0, 2, 1, 3, 4, 6, 5, 7]


def test_workers_speak_json_only():
    """What a library prints goes to standard error."""
    code = (
        "from benchmarks.peers.protocol import take_standard_output, write\n"
        "out = take_standard_output()\nprint('noise')\nwrite(out, {'a': 1})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=compare.ROOT,
    )
    assert json.loads(done.stdout) == {"a": 1}
    assert done.stderr == "noise\n"
