"""Bytes and operations of a step, by hand for a small model."""

import dataclasses

import pytest

from jllm.config import EngineConfig
from jllm.engine.create import plan_start
from jllm.plan.cost import GroupCost, StepCost, farthest, replica_cost
from jllm.plan.hardware import devices
from jllm.plan.topology import gpu_topology, tpu_topology
from jllm.weights.hub import CheckpointFiles
from shardings.mesh import abstract_mesh
from tests.engines import LLAMA

# Per layer: fused QKV of 8 + 2 x 4 heads of 24, output, gate, up and down.
LAYER = 56 * (8 + 2 * 4) * 24 + 8 * 24 * 56 + 3 * 56 * 144


def cost_of(tensor=1, **config):
    """The small model in bfloat16 on H200s."""
    files = CheckpointFiles("x", {**LLAMA, "torch_dtype": "bfloat16", **config}, {})
    device = devices()["h200"]
    mesh = abstract_mesh(tensor=tensor)
    return replica_cost(
        plan_start(EngineConfig(), files, mesh, device.target, device.memory)
    )


def test_weights_and_cache_of_one_device():
    cost = cost_of()
    assert cost.layer_weights == 2 * LAYER
    assert cost.head_weights == 512 * 56  # padded
    assert cost.groups == (GroupCost(None, 2 * 2 * 2 * 4 * 24, 2 * 8 * 24),)


def test_a_step_of_decode():
    step = cost_of().decode(8, 99)
    weights = 2 * LAYER + 512 * 56
    assert step.weight_bytes == 2 * weights
    assert step.kv_bytes == 8 * 100 * 2 * 2 * 2 * 4 * 24
    assert step.linear_flops == 2 * 8 * weights
    assert step.attention_flops == 4 * 8 * 100 * 2 * 8 * 24
    assert step.sent_bytes == step.num_sums == 0


def test_a_prefill_computes_logits_once_and_half_of_the_square():
    step = cost_of().prefill(64)
    assert step.linear_flops == 2 * (64 * 2 * LAYER + 512 * 56)
    assert step.attention_flops == 4 * 64 * 64 / 2 * 2 * 8 * 24
    two = cost_of().prefill(128, 64)
    assert two.attention_flops == 2 * step.attention_flops
    assert two.linear_flops == 2 * step.linear_flops


def test_four_devices_share_the_work_and_send_hidden_states():
    alone, shared = (cost_of(size).decode(8, 99) for size in (1, 4))
    assert shared.bytes == alone.bytes / 4
    assert shared.flops == alone.flops / 4
    assert shared.num_sums == 5
    assert shared.sent_bytes == 5 * 2 * (8 * 56 * 2) * 3 / 4


def test_more_devices_than_kv_heads_repeat_the_cache():
    four, eight = (cost_of(size).groups[0].kv_bytes for size in (4, 8))
    assert four == eight


@pytest.mark.parametrize(
    ("num_tokens", "pairs"), [(10, 50), (100, 100 * 100 / 2), (300, 5000 + 200 * 100)]
)
def test_a_window_bounds_what_is_seen(num_tokens, pairs):
    group = GroupCost(100, 1, 1)
    assert group.pairs(num_tokens) == pairs
    assert group.seen(num_tokens) == min(num_tokens, 100)


def test_the_time_is_that_of_one_limit_after_the_other():
    device = dataclasses.replace(
        devices()["v6e"], bandwidth=10.0, flops=100.0, sent=5.0, hop_seconds=0.5
    )
    step = StepCost(
        weight_bytes=20,
        kv_bytes=10,
        linear_flops=100,
        attention_flops=300,
        sent_bytes=10,
        num_sums=2,
    )
    assert step.seconds(device, 3) == pytest.approx(2 + 3 + 2 + 2 * 2 * 3 * 0.5)


@pytest.mark.parametrize(
    ("topology", "num_devices", "hops"),
    [
        (tpu_topology("v6e:16x16"), 1, 0),
        (tpu_topology("v6e:16x16"), 8, 3),
        (tpu_topology("v6e:16x16"), 128, 12),
        (tpu_topology("tpu7x:4x4x4"), 64, 6),
        (gpu_topology("h200", 8), 8, 0),
    ],
)
def test_the_farthest_of_some_devices(topology, num_devices, hops):
    assert farthest(topology, num_devices) == hops
