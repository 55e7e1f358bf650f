"""Counters of the engine as plain values; no exporter here."""

import dataclasses


@dataclasses.dataclass(slots=True)
class EngineMetrics:
    """What an engine has done since it was made.

    Attributes:
        steps: Steps launched.
        dispatches: Compiled programs called.
        host_to_device_copies: Arrays sent to the device.
        device_to_host_copies: Arrays read back.
        scheduled_tokens: Tokens computed, prompt and output.
        launch_seconds: Host time spent packing and dispatching.
        kernel_fallbacks: Kernels of the accelerator that could not be used, each
            reason once; the log names them.
    """

    steps: int = 0
    dispatches: int = 0
    host_to_device_copies: int = 0
    device_to_host_copies: int = 0
    scheduled_tokens: int = 0
    launch_seconds: float = 0.0
    kernel_fallbacks: int = 0
