"""What the compilers make of every kernel, for an NVIDIA H200 and three TPUs.

Some cases of each operation, for the H200 and for one generation of TPUs after the
other; `make aot-kernels` compiles all for all and records it. See compile_kernels.py.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from benchmarks.kernels.run import operations
from tests.aot.provenance import ROOT
from tests.aot.test_steps import COMPILERS

pytestmark = pytest.mark.aot

SAMPLE = "8"


@pytest.fixture(scope="module")
def lines_of(tmp_path_factory):
    """Gives what was compiled for a platform; skips where its compiler is missing."""
    found = [p for p in COMPILERS if any(map(importlib.util.find_spec, COMPILERS[p]))]
    command = [sys.executable, "-m", "tests.aot.compile_kernels"]
    dump = str(tmp_path_factory.mktemp("mosaic"))
    own = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": dump}
    environment = {**os.environ, **own}
    processes = {
        platform: subprocess.Popen(
            [*command, platform, "--rotate", "--sample", SAMPLE],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for platform in found
    }

    @functools.cache
    def lines(platform):
        if platform not in processes:
            pytest.skip(f"none of {COMPILERS[platform]} is installed (extra aot)")
        out, errors = processes[platform].communicate(timeout=1500)
        assert processes[platform].returncode == 0, errors[-4000:]
        return [json.loads(line) for line in out.splitlines()]

    yield lines
    for process in processes.values():
        process.kill()
        process.communicate()


def name_of(line):
    return " ".join(
        line[key] for key in ("operation", "case", "implementation", "device")
    )


@pytest.mark.parametrize("platform", COMPILERS)
def test_every_case_compiles(lines_of, platform):
    lines = lines_of(platform)
    assert {name_of(x): x["error"] for x in lines if "error" in x} == {}
    # Mosaic GPU leaves some widths and types to Triton.
    refused = {name_of(x): x["unsupported"] for x in lines if "unsupported" in x}
    assert {n: why for n, why in refused.items() if "gpu_mosaic" not in n} == {}


@pytest.mark.parametrize("platform", COMPILERS)
def test_every_operation_has_a_kernel(lines_of, platform):
    with_kernel = {x["operation"] for x in lines_of(platform) if x.get("custom_calls")}
    assert with_kernel >= set(operations())


@pytest.mark.parametrize("platform", COMPILERS)
def test_what_is_donated_is_updated_in_place(lines_of, platform):
    donated = [x for x in lines_of(platform) if x.get("num_donated")]
    assert donated
    for line in donated:
        assert line["aliased_parameters"] >= line["num_donated"], name_of(line)
        assert line["large_moves"] == [], name_of(line)


@pytest.mark.parametrize("platform", COMPILERS)
def test_kernels_fit_their_device(lines_of, platform):
    lines = lines_of(platform)
    assert {name_of(x): x["over_bounds"] for x in lines if x.get("over_bounds")} == {}


def any_shared(kernels):
    return any(kernel["shared_bytes"] for kernel in kernels)


def test_every_kernel_of_a_gpu_is_known_to_its_assembler(lines_of):
    with_kernel = [x for x in lines_of("gpu") if x.get("custom_calls")]
    assert with_kernel
    missing = [name_of(x) for x in with_kernel if not x["kernels"]]
    assert missing == [], "is ptxas on the PATH?"
    for operation in ("paged_attention", "ragged_attention", "flash_attention"):
        own = [x for x in with_kernel if x["operation"] == operation]
        none = [name_of(x) for x in own if not any_shared(x["kernels"])]
        assert none == []


def test_every_kernel_of_a_tpu_has_its_memory_counted(lines_of):
    with_kernel = [x for x in lines_of("tpu") if x.get("custom_calls")]
    assert with_kernel
    # Blocks are copied within the main memory.
    in_vmem = [x for x in with_kernel if x["operation"] != "copy_blocks"]
    assert [name_of(x) for x in in_vmem if not x["vmem_bytes"]] == []
    paged = [x for x in with_kernel if x["operation"] == "paged_attention"]
    # Block tables at least.
    assert min(x["smem_bytes"] for x in paged) > 1024
