"""`jllm plan` with the real compilers: each run in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from jllm.plan.described import COMPILERS
from tests.aot.compile_steps import MODEL
from tests.aot.provenance import ROOT

pytestmark = pytest.mark.aot

SMALL = {**MODEL, "head_dim": 128, "torch_dtype": "bfloat16"}


def plan(folder, config, *options):
    """Exit code, the report, and what went wrong."""
    platform = "gpu" if "--gpu" in options else "tpu"
    if not any(map(importlib.util.find_spec, COMPILERS[platform])):
        pytest.skip(f"none of {COMPILERS[platform]} is installed (extra aot)")
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "jllm", "plan", str(path), *options, "--json"]
    found = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    report = json.loads(found.stdout) if found.returncode == 0 else None
    return found.returncode, report, found.stderr


@pytest.mark.parametrize(
    ("where", "tensor"),
    [
        (("--topology", "v5e:2x2"), 4),
        (("--topology", "tpu7x:2x2x1"), 8),
        (("--gpu", "h200"), 1),
        (("--gpu", "h200", "--devices", "8"), 8),
    ],
    ids=["v5e", "tpu7x", "h200", "h200x8"],
)
def test_steps_of_a_small_model(tmp_path, where, tensor):
    options = (*where, "--tensor", str(tensor), "--max-model-len", "8192")
    code, report, error = plan(
        tmp_path, SMALL, *options, "--rows", "40", "--programs", "largest"
    )
    assert code == 0, error
    memory = report["memory_per_device"]
    assert memory["fits"]
    assert [step["kind"] for step in report["steps"]] == ["prefill", "decode"]
    for step in report["steps"]:
        compiled = step["compiled"]
        assert compiled["fallbacks"] == []
        # Weights and pools, and little beside them.
        held = memory["weights"] + memory["pool"]
        assert held <= compiled["argument_bytes"] < held * 1.05 + 2**20
        assert compiled["temporary_bytes"] <= memory["temporaries"]
        sent = compiled["collectives"]
        if tensor == 1:
            assert sent == {}
            continue
        hidden = step["size"] * SMALL["hidden_size"]
        count, size = sent["all-reduce"]
        # Two sums of hidden states per layer and one for the embedding; the rest is
        # small: what a draw compares.
        assert count >= 5
        assert 5 * 2 * hidden <= size <= 5 * 4 * hidden * 1.2 + 2**20


def test_a_large_model_on_64_chips(tmp_path, shared_data):
    """Llama-3.1-70B with a tenth of its layers, which compile ten times as fast."""
    path = (
        shared_data
        / "data"
        / "hf_configs"
        / "meta-llama--Meta-Llama-3.1-70B_config.json"
    )
    config = {**json.loads(path.read_text()), "num_hidden_layers": 8}
    where = ("--topology", "v6e:8x8", "--tensor", "8", "--programs", "largest")
    code, report, error = plan(tmp_path, config, *where, "--max-model-len", "32768")
    assert code == 0, error
    assert report["layout"] == {"tensor": 8, "data": 8, "pipeline": 1}
    assert report["concurrent_requests"]["2048"] > 0
    # Of some programs the compiler estimates nothing.
    estimates = [step["compiled"]["estimated_seconds"] for step in report["steps"]]
    assert all(seconds is None or seconds > 0 for seconds in estimates)


def test_a_search_compiles_the_best(tmp_path):
    where = ("--topology", "v5e:2x2", "--search", "--most-compiled", "1")
    code, report, error = plan(tmp_path, SMALL, *where, "--max-model-len", "8192")
    assert code == 0, error
    assert report["num_compiled"] == 1
    compiled = [
        any(step["compiled"] for step in plan["steps"]) for plan in report["plans"]
    ]
    assert compiled == [True] + [False] * (len(compiled) - 1)
