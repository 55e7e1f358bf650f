"""The kind of device that a kernel is made for."""

import dataclasses
from typing import Any, Literal

import jax

Platform = Literal["cpu", "gpu", "tpu"]

TPU_GENERATIONS = {
    "TPU v4": "v4",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What a kernel has to know of the device before it is compiled.

    Kernels never ask JAX for its devices: they are also compiled where there are none.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        generation: Of a GPU its architecture, such as "sm_90"; of a TPU "v5e", "v6e"
            and so on; empty where it is not known.
        name: Short name of the device, such as "h200"; tuned sizes are filed under it.
        num_cores: Multiprocessors of a GPU, tensor cores of a TPU.
        interpret: What `pallas_call` takes under this name; true to run a kernel
            without the device.
    """

    platform: Platform
    generation: str = ""
    name: str = ""
    num_cores: int = 1
    interpret: Any = False

    @classmethod
    def of(cls, device: Any) -> "Target":
        """Describes a `jax.Device`, perhaps one of a topology that is not there."""
        kind = device.device_kind
        if device.platform == "tpu":
            generation = TPU_GENERATIONS.get(kind, "")
            return cls("tpu", generation, generation, 1)
        if device.platform in ("gpu", "cuda", "rocm"):
            capability = str(getattr(device, "compute_capability", ""))
            generation = f"sm_{capability.replace('.', '')}" if capability else ""
            name = kind.lower().removeprefix("nvidia ").replace(" ", "_")
            return cls("gpu", generation, name, int(getattr(device, "core_count", 1)))
        return cls("cpu", name="cpu")

    @classmethod
    def default(cls) -> "Target":
        """Describes the first device of the process."""
        return cls.of(jax.devices()[0])
