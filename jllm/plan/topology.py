"""Which slices of devices there are, and how a model can be laid out on one."""

import dataclasses
import math

from jllm.errors import ConfigError
from jllm.plan.hardware import Device, devices

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
SHAPES = {"v5e": FLAT, "v6e": FLAT, "tpu7x": CUBIC}
"""Chips along each axis of the slices that a TPU's generation comes in."""

MOST_GPUS = 8
"""GPUs that share one switch; more of them are replicas on other machines."""


@dataclasses.dataclass(frozen=True, slots=True)
class Topology:
    """Devices that are connected.

    Attributes:
        name: "v6e:4x4", or "h200 x 8".
        device: Each of them.
        shape: Chips along each axis; of GPUs, which share a switch, one axis.
    """

    name: str
    device: Device
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """How many devices JAX would show."""
        return math.prod(self.shape) * self.device.devices_per_chip


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How a model lies on devices.

    Attributes:
        tensor: Devices that share each layer.
        data: Replicas.
        pipeline: Stages that share the stack of layers.
    """

    tensor: int
    data: int = 1
    pipeline: int = 1

    def __str__(self) -> str:
        """As the sizes are written in messages."""
        stages = f" x pipeline={self.pipeline}" if self.pipeline > 1 else ""
        return f"tensor={self.tensor} x data={self.data}{stages}"

    @property
    def num_devices(self) -> int:
        """How many devices it takes."""
        return self.tensor * self.data * self.pipeline


def known_topologies() -> tuple[str, ...]:
    """Names of all TPU slices that can be planned for."""
    return tuple(f"{name}:{shape}" for name, all_ in SHAPES.items() for shape in all_)


def tpu_topology(name: str) -> Topology:
    """The slice of a name such as "v6e:4x4".

    Raises:
        ConfigError: There is none; lists those there are.
    """
    kind, _, shape = name.partition(":")
    if shape not in SHAPES.get(kind, ()):
        known = "; ".join(f"{kind}: {', '.join(all_)}" for kind, all_ in SHAPES.items())
        raise ConfigError(f"topology={name!r} is not known; there are {known}")
    sides = tuple(int(side) for side in shape.split("x"))
    return Topology(name, devices()[kind], sides)


def gpu_topology(name: str, num_devices: int) -> Topology:
    """Some GPUs of a kind that share a switch.

    Raises:
        ConfigError: No such GPU, or a number that no switch connects.
    """
    known = [key for key, device in devices().items() if device.platform == "gpu"]
    if name not in known:
        raise ConfigError(f"gpu={name!r} is not known; there are {', '.join(known)}")
    if not 1 <= num_devices <= MOST_GPUS:
        raise ConfigError(f"devices={num_devices} must be 1 to {MOST_GPUS}")
    return Topology(f"{name} x {num_devices}", devices()[name], (num_devices,))


def make_layout(
    topology: Topology, *, tensor: int, data: int | None = None, pipeline: int = 1
) -> Layout:
    """A layout that takes all devices of a topology.

    Args:
        topology: The devices.
        tensor: Devices that share each layer.
        data: Replicas; None takes as many as there is room for.
        pipeline: Stages that share the stack of layers.

    Raises:
        ConfigError: It takes more devices than there are, or leaves some unused.
    """
    for name, size in (("tensor", tensor), ("data", data), ("pipeline", pipeline)):
        if size is not None and size < 1:
            raise ConfigError(f"{name}={size} must be at least 1")
    here = topology.num_devices
    layout = Layout(tensor, data or max(1, here // (tensor * pipeline)), pipeline)
    if layout.num_devices != here:
        raise ConfigError(
            f"{layout} takes {layout.num_devices} devices, but {topology.name} has "
            f"{here}: their product must be {here}"
        )
    return layout


def all_layouts(topology: Topology) -> tuple[Layout, ...]:
    """Every layout that takes all devices, fewest stages and per layer first."""
    here = topology.num_devices
    return tuple(
        Layout(tensor, here // (tensor * stages), stages)
        for stages in _divisors(here)
        for tensor in _divisors(here // stages)
    )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
