"""Figures of the devices that can be planned for, from `hardware.json`."""

import dataclasses
import functools
import json
from pathlib import Path

from jllm.layers.kernels import Target


@dataclasses.dataclass(frozen=True, slots=True)
class Price:
    """What an hour of a chip costs.

    Attributes:
        dollars_per_hour: Of one chip, which may be more than one device.
        date: When the source said so.
        source: Who said so, and of what kind of contract.
    """

    dollars_per_hour: float
    date: str
    source: str


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """One device as JAX counts them: of a chip with two cores, one core.

    Attributes:
        name: Its key in `hardware.json`.
        platform: "gpu" or "tpu".
        generation: As in `Target`.
        short_name: As in `Target`.
        num_cores: As in `Target`.
        devices_per_chip: Devices that share a chip, which is what is paid for.
        memory: Bytes that programs can have.
        bandwidth: Bytes per second from its memory.
        flops: Operations per second of products of 16-bit numbers.
        sent: Bytes per second that it can send to its neighbours together.
        hop_seconds: Least delay from one device to the next; 0 where not known.
        source: Where the figures are from.
        price: List price; None where no source is known.
    """

    name: str
    platform: str
    generation: str
    short_name: str
    num_cores: int
    devices_per_chip: int
    memory: int
    bandwidth: float
    flops: float
    sent: float
    hop_seconds: float
    source: str
    price: Price | None

    @property
    def target(self) -> Target:
        """What kernels know of it."""
        platform = "gpu" if self.platform == "gpu" else "tpu"
        return Target(platform, self.generation, self.short_name, self.num_cores)


@functools.cache
def devices() -> dict[str, Device]:
    """All devices that can be planned for, by name."""
    text = (Path(__file__).parent / "hardware.json").read_text("utf-8")
    found: dict[str, Device] = {}
    for name, figures in json.loads(text).items():
        price = figures.pop("price")
        found[name] = Device(
            name=name, price=None if price is None else Price(**price), **figures
        )
    return found


def list_price(device: Device) -> float | None:
    """Dollars of a device and hour by the price list; None if there is none."""
    if device.price is None:
        return None
    return device.price.dollars_per_hour / device.devices_per_chip
