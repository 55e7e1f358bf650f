"""Plans by the roofline: every model that is supported, on every slice."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from jllm.config import EngineConfig
from jllm.errors import ConfigError
from jllm.plan.planner import Task, estimate, require, search
from jllm.plan.throughput import Workload
from jllm.plan.topology import (
    Layout,
    all_layouts,
    gpu_topology,
    known_topologies,
    tpu_topology,
)
from jllm.weights.hub import CheckpointFiles
from tests.engines import LLAMA_8B

GIB = 2**30
ROOT = pathlib.Path(__file__).parents[3]


def task(topology, config=LLAMA_8B, price=None, path="config.json", **options):
    return Task(
        files=CheckpointFiles(path, config, {}),
        topology=topology,
        config=EngineConfig(**options),
        workload=Workload(),
        price=price,
        programs="none",
    )


def test_llama_8b_on_one_h200():
    """Figures by hand: 8.03e9 weights of 2 bytes, 128 KiB of cache per token."""
    plan = estimate(task(gpu_topology("h200", 1), max_model_len=8192), Layout(1))
    memory = plan.memory
    assert memory.weights == pytest.approx(2 * 8.03e9, rel=1e-3)
    assert memory.fits
    block = 16 * (131072 + 4)
    assert memory.pool == memory.num_blocks * block
    free = memory.allowed - memory.weights - memory.temporaries
    assert free - block < memory.pool <= free
    assert memory.requests(8192) == memory.num_blocks * 16 // 8192
    assert memory.requests(32768) is None
    decode = next(s for s in plan.steps if (s.kind, s.size) == ("decode", 8))
    weights = 2 * (8.03e9 - 128256 * 4096)
    cache = 8 * (1024 + 128 + 1) * 131072
    assert decode.cost.bytes == pytest.approx(weights + cache, rel=1e-3)
    assert decode.seconds == pytest.approx((weights + cache) / 4.8e12, rel=1e-2)


def test_what_is_missing_is_said():
    plan = estimate(task(tpu_topology("v5e:1x1")), Layout(1))
    assert not plan.memory.fits
    missing = plan.memory.missing / GIB
    with pytest.raises(
        ConfigError, match=f"does not fit: {missing:.2f} GiB are missing"
    ):
        require(plan)
    assert plan.throughput is None


def test_a_context_that_was_asked_for_must_fit():
    asked = {"max_model_len": 131072, "max_num_seqs": 8}
    small = estimate(task(tpu_topology("v5e:2x2"), **asked), Layout(2, 2))
    assert small.memory.missing > 0
    assert estimate(task(tpu_topology("v5e:2x2")), Layout(2, 2)).memory.fits


def test_heads_that_cannot_be_shared_are_refused():
    with pytest.raises(ConfigError, match="must divide the 32 query heads"):
        estimate(task(tpu_topology("v6e:8x8")), Layout(64))


def test_twice_the_replicas_are_twice_the_speed_at_the_same_cost():
    small, large = (
        estimate(task(tpu_topology(name), price=2.0), Layout(4, data))
        for name, data in (("v6e:2x2", 1), ("v6e:2x4", 2))
    )
    assert large.speed == pytest.approx(2 * small.speed)
    dollars = small.throughput.dollars_per_million
    assert large.throughput.dollars_per_million == pytest.approx(dollars)
    assert dollars == pytest.approx(4 * 2.0 / 3600 / small.speed * 1e6)


@pytest.mark.slow
def test_a_search_orders_what_fits_and_says_why_the_rest_does_not():
    found = search(task(tpu_topology("v5e:8x8")), most_compiled=2, tell=print)
    assert found.num_compiled == 0  # programs="none"
    speeds = [plan.speed for plan in found.plans]
    assert speeds == sorted(speeds, reverse=True)
    assert len(found.plans) + len(found.refused) == len(
        all_layouts(tpu_topology("v5e:8x8"))
    )
    reasons = {
        (layout.tensor, layout.pipeline): reason for layout, reason in found.refused
    }
    assert "GiB are missing" in reasons[1, 1]
    assert "query heads" in reasons[64, 1]


@pytest.fixture(scope="module")
def published(shared_data):
    """What fits of every published model, by topology."""
    folder = shared_data / "data" / "hf_configs"
    found = subprocess.run(
        [sys.executable, "-m", "tests.jllm.plan.published", str(folder)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    lines = map(json.loads, found.stdout.splitlines())
    return {line["topology"]: line["models"] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*known_topologies(), "h200 x 8"])
def test_every_published_model_on_every_topology(published, name):
    """The largest has 405e9 weights of 2 bytes: a terabyte does, and no less."""
    topology = gpu_topology("h200", 8) if "h200" in name else tpu_topology(name)
    assert len(published[name]) >= 10
    for model, found in published[name].items():
        plans = found["plans"]
        assert len(plans) + found["num_refused"] == len(all_layouts(topology))
        speeds = [plan["speed"] for plan in plans]
        assert speeds == sorted(speeds, reverse=True)
        for plan in plans:
            assert plan["num_devices"] == topology.num_devices
            assert plan["fits"]
            assert plan["free"] >= 0
            assert plan["num_blocks"] > 0
            assert plan["least_seconds"] > 0
        if "405B" in model:
            gib = topology.num_devices * topology.device.memory / GIB
            assert bool(plans) == (gib > 950)
