"""What XLA makes of the engine's programs on an NVIDIA H200 and on a TPU v6e.

Both are compiled without a device, each in a process of its own: see compile_steps.py.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.aot.compile_steps import ALL, CASES, MODEL, NUM_ROWS, NUM_TOKENS, ROOT

pytestmark = pytest.mark.aot

COMPILERS = {"gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin"), "tpu": ("libtpu",)}
PROGRAMS = [
    pytest.param(platform, case, program, id=f"{platform}-{name}-{program}")
    for platform, cases in CASES.items()
    for case in cases
    for name in [f"{case.num_devices}x{case.head_dim}"]
    for program in case.programs
]
on_every_program = pytest.mark.parametrize(("platform", "case", "program"), PROGRAMS)
SHARED = [param for param in PROGRAMS if param.values[1].num_devices > 1]


def start(platform):
    """The process that compiles for a platform."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.aot.compile_steps", platform],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def report_of():
    """Gives what was compiled, by platform, case and program; skips what cannot be."""
    found = [p for p in CASES if any(map(importlib.util.find_spec, COMPILERS[p]))]
    processes = {platform: start(platform) for platform in found}  # side by side

    @functools.cache
    def reports(platform):
        out, errors = processes[platform].communicate(timeout=900)
        assert processes[platform].returncode == 0, errors[-4000:]
        lines = [json.loads(line) for line in out.splitlines()]
        return {(r["num_devices"], r["head_dim"], r["program"]): r for r in lines}

    def report(platform, case, program):
        if platform not in processes:
            pytest.skip(f"none of {COMPILERS[platform]} is installed (extra aot)")
        return reports(platform)[case.num_devices, case.head_dim, program]

    yield report
    for process in processes.values():
        process.kill()
        process.communicate()


@on_every_program
def test_nothing_of_the_size_of_a_pool_or_a_weight_moves(
    report_of, platform, case, program
):
    assert report_of(platform, case, program)["large_moves"] == []


@on_every_program
def test_temporaries_are_under_an_eighth_of_the_pool(
    report_of, platform, case, program
):
    report = report_of(platform, case, program)
    assert report["temporary_bytes"] < report["pool_bytes"] / 8


@on_every_program
def test_every_state_leaf_is_updated_in_place(report_of, platform, case, program):
    report = report_of(platform, case, program)
    assert report["aliased_leaves"] == report["state_leaves"]
    assert report["aliased_bytes"] >= report["state_bytes"]


@pytest.mark.parametrize(("platform", "case", "program"), SHARED)
def test_devices_send_no_weights_and_no_logits(report_of, platform, case, program):
    report = report_of(platform, case, program)
    assert report["collectives"]
    for opcode, size in report["collectives"]:
        assert opcode == "all-reduce" or size < report["logits_bytes"] / 8, opcode


@pytest.mark.parametrize("program", ["decode", "prefill"])
@pytest.mark.parametrize("platform", CASES)
def test_two_all_reduces_per_layer(report_of, platform, program):
    report = report_of(platform, CASES[platform][1], program)
    opcodes, sizes = zip(*report["collectives"], strict=True)
    assert set(opcodes) == {"all-reduce"}
    hidden = MODEL["hidden_size"] * (NUM_ROWS if program == "decode" else NUM_TOKENS)
    of_hidden = [size for size in sizes if size in (2 * hidden, 4 * hidden)]
    # One more for the embedding, whose vocabulary is divided.
    assert len(of_hidden) == 2 * MODEL["num_hidden_layers"] + 1
    others = sorted(set(sizes) - set(of_hidden))
    assert len(sizes) - len(of_hidden) <= 5
    assert max(others) < report["logits_bytes"] / 32


@pytest.mark.parametrize("platform", CASES)
def test_one_device_sends_nothing(report_of, platform):
    for program in ALL:
        assert report_of(platform, CASES[platform][0], program)["collectives"] == []
