"""Bytes and operations of the steps of one replica, per device, and the least time.

A step of decode reads every weight once and the cache of every row; a prefill takes
every token times every weight; each layer ends in two sums over the devices that share
it. The time is that of one kernel after the other, each at its limit. Formulas as in
"How to Scale Your Model" (Austin et al., 2025), chapters on sharding and inference.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jllm.engine.startup import StartPlan
from jllm.plan.hardware import Device
from jllm.plan.topology import Topology


@dataclasses.dataclass(frozen=True, slots=True)
class GroupCost:
    """Attention of the layers with one window, on one device.

    Attributes:
        window: Newest positions that a token sees; None for all.
        kv_bytes: Cache of one token in all of them.
        width: Query heads times head width, summed over them.
    """

    window: int | None
    kv_bytes: int
    width: int

    def seen(self, context: float) -> float:
        """Positions that a token sees after so many others."""
        return context if self.window is None else min(context, self.window)

    def pairs(self, num_tokens: float) -> float:
        """Pairs of a token and one that it sees, in a prompt of so many tokens."""
        inside = self.seen(num_tokens)
        return inside * inside / 2 + (num_tokens - inside) * inside


@dataclasses.dataclass(frozen=True, slots=True)
class StepCost:
    """What one step asks of one device.

    Attributes:
        weight_bytes: Weights read.
        kv_bytes: Cache read or written.
        linear_flops: Operations of the products with weights.
        attention_flops: Operations of attention.
        sent_bytes: Bytes sent to other devices.
        num_sums: Sums over the devices that share the layers.
    """

    weight_bytes: float
    kv_bytes: float
    linear_flops: float
    attention_flops: float
    sent_bytes: float
    num_sums: int

    @property
    def bytes(self) -> float:
        """Bytes read or written in the device's memory."""
        return self.weight_bytes + self.kv_bytes

    @property
    def flops(self) -> float:
        """Operations."""
        return self.linear_flops + self.attention_flops

    def seconds(self, device: Device, hops: int) -> float:
        """The least time of the step.

        Args:
            device: The device.
            hops: Devices between the two farthest of those that share a layer.
        """
        linear = max(
            self.weight_bytes / device.bandwidth, self.linear_flops / device.flops
        )
        attention = max(
            self.kv_bytes / device.bandwidth, self.attention_flops / device.flops
        )
        # There and back: a sum is spread, then gathered.
        delay = 2 * self.num_sums * hops * device.hop_seconds
        return linear + attention + self.sent_bytes / device.sent + delay


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaCost:
    """What the steps of a replica ask of each of its devices.

    Attributes:
        layer_weights: Weights of the layers on a device.
        head_weights: Weights of the output head on a device.
        item_bytes: Bytes of a weight or an activation.
        groups: Attention, by window.
        width: Length of the hidden states.
        num_layers: Layers.
        tensor: Devices that share each layer.
    """

    layer_weights: int
    head_weights: int
    item_bytes: int
    groups: tuple[GroupCost, ...]
    width: int
    num_layers: int
    tensor: int

    def decode(self, num_rows: int, context: float) -> StepCost:
        """A step in which each row computes one token after `context` others."""
        seen = [group.seen(context + 1) for group in self.groups]
        return self._step(
            num_rows,
            num_rows,
            kv_bytes=num_rows * _dot(seen, [g.kv_bytes for g in self.groups]),
            pairs=[num_rows * positions for positions in seen],
        )

    def prefill(self, num_tokens: int, prompt: int | None = None) -> StepCost:
        """A step that computes whole prompts, or as much of one as it can.

        Args:
            num_tokens: Tokens of the step.
            prompt: Tokens of each prompt; None for one prompt of all tokens.
        """
        length = prompt or num_tokens
        share = num_tokens / length
        return self._step(
            num_tokens,
            math.ceil(share),
            kv_bytes=num_tokens * sum(group.kv_bytes for group in self.groups),
            pairs=[share * group.pairs(length) for group in self.groups],
        )

    def _step(
        self,
        num_tokens: int,
        num_logits: int,
        *,
        kv_bytes: float,
        pairs: Sequence[float],
    ) -> StepCost:
        linear = num_tokens * self.layer_weights + num_logits * self.head_weights
        # Two sums per layer, and one for the embedding.
        num_sums = 2 * self.num_layers + 1 if self.tensor > 1 else 0
        hidden = num_tokens * self.width * self.item_bytes
        return StepCost(
            weight_bytes=self.item_bytes * (self.layer_weights + self.head_weights),
            kv_bytes=kv_bytes,
            linear_flops=2 * linear,
            attention_flops=4 * _dot(pairs, [group.width for group in self.groups]),
            sent_bytes=num_sums * 2 * hidden * (self.tensor - 1) / self.tensor,
            num_sums=num_sums,
        )


def replica_cost(start: StartPlan) -> ReplicaCost:
    """What the steps of a replica ask of each of its devices."""
    model, weights = start.model, start.weights()
    tensor = model.options.tensor_size
    head = weights.get("head", weights["embed"])
    specs = model.specs()["layers"]
    item = jnp.dtype(start.resolved.dtype).itemsize
    token = math.prod(model.kv_shape(1, 1)) * jnp.dtype(model.kv_dtype).itemsize
    return ReplicaCost(
        layer_weights=_local_elements(weights["layers"]),
        head_weights=_local_elements(head),
        item_bytes=item,
        groups=tuple(
            GroupCost(
                window=group.window,
                kv_bytes=len(group.layers) * token // tensor,
                width=sum(specs[i]["out"].shape[-1] for i in group.layers) // tensor,
            )
            for group in model.cache_groups
        ),
        width=model.width,
        num_layers=model.num_layers,
        tensor=tensor,
    )


def farthest(topology: Topology, num_devices: int) -> int:
    """Hops between the farthest of some devices on a torus, as nearly square as can be.

    There are none where every device is next to every other one.
    """
    axes = len(topology.shape)
    if axes == 1:
        return 0
    sides, rest, factor = [1] * axes, num_devices, 2
    while rest > 1:
        while rest % factor:
            factor += 1
        rest //= factor
        sides[sides.index(min(sides))] *= factor
    return sum(side // 2 for side in sides)


def _local_elements(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
