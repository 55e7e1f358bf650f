"""Tokens per second of a queue that never empties, and what they cost."""

import dataclasses
import math

from jllm.plan.cost import ReplicaCost, farthest
from jllm.plan.memory import DeviceMemory
from jllm.plan.topology import Layout, Topology


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """What the requests are like.

    Attributes:
        input_tokens: Tokens of a prompt.
        output_tokens: Tokens of its answer.
    """

    input_tokens: int = 1024
    output_tokens: int = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Throughput:
    """What all replicas together do at the roofline.

    Attributes:
        rows: Requests that run at once in each replica, shared by the stages.
        decode_seconds: A step of decode in the middle of their answers.
        prefill_seconds: The share of a prompt in the steps that compute prompts.
        output_tokens_per_second: Of all replicas, prompts computed beside them.
        decode_tokens_per_second: Of all replicas, if there were no prompts.
        dollars_per_million: A million output tokens; None without a price.
    """

    rows: int
    decode_seconds: float
    prefill_seconds: float
    output_tokens_per_second: float
    decode_tokens_per_second: float
    dollars_per_million: float | None


def throughput(
    cost: ReplicaCost,
    memory: DeviceMemory,
    topology: Topology,
    layout: Layout,
    *,
    workload: Workload,
    token_budget: int,
    price: float | None,
) -> Throughput | None:
    """Speed of a layout; None if no request of the workload fits its memory.

    Args:
        cost: What steps ask of a device.
        memory: What fits it.
        topology: The devices.
        layout: How they are used.
        workload: What the requests are like.
        token_budget: Most tokens of a step.
        price: Dollars of a device and hour.
    """
    prompt, answer = workload.input_tokens, workload.output_tokens
    rows = memory.requests(prompt + answer)
    if not rows:
        return None
    device, hops = topology.device, farthest(topology, layout.tensor)
    # Each stage computes its share of the rows, and hands them on.
    stages = layout.pipeline
    step = cost.decode(math.ceil(rows / stages), prompt + answer / 2)
    decode = step.seconds(device, hops)
    filled = cost.prefill(token_budget, prompt)
    prefill = filled.seconds(device, hops) * prompt / token_budget
    speed = layout.data * rows * answer / (stages * answer * decode + rows * prefill)
    hourly = None if price is None else price * layout.num_devices
    return Throughput(
        rows=rows,
        decode_seconds=decode,
        prefill_seconds=prefill,
        output_tokens_per_second=speed,
        decode_tokens_per_second=layout.data * rows / stages / decode,
        dollars_per_million=None if hourly is None else hourly / 3600 / speed * 1e6,
    )
