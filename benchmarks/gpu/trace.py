"""Reads a trace of `jax.profiler`: when the device was busy, with what launches."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import jax

DEVICE_LINES = ("Stream", "XLA Ops", "XLAPjRt", "tf_XLA", "XLAEigen")
"""Beginnings of the names of the lines that show work: a GPU's streams, a TPU's core,
the threads of a CPU."""


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceUse:
    """What a device did during a trace.

    Attributes:
        launches: Pieces of work that it ran.
        busy_seconds: Time in which at least one ran.
        span_seconds: From the start of the first to the end of the last.
    """

    launches: int
    busy_seconds: float
    span_seconds: float

    @property
    def idle_share(self) -> float:
        """Share of the span in which nothing ran."""
        return 1 - self.busy_seconds / self.span_seconds if self.span_seconds else 0.0


def device_use(intervals: Iterable[tuple[float, float]]) -> DeviceUse:
    """Sums up pieces of work that may overlap.

    Args:
        intervals: Start and end of each, in nanoseconds, in any order.
    """
    ordered = sorted(intervals)
    if not ordered:
        return DeviceUse(0, 0.0, 0.0)
    busy, last = 0.0, ordered[0][0]
    for start, end in ordered:
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return DeviceUse(len(ordered), busy / 1e9, (last - ordered[0][0]) / 1e9)


def read_trace(folder: pathlib.Path) -> DeviceUse:
    """The first device's work in the newest trace under a folder.

    Raises:
        FileNotFoundError: There is no trace.
        ValueError: No line of it shows work of a device.
    """
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no *.xplane.pb under {folder}")
    data = jax.profiler.ProfileData.from_file(str(files[-1]))
    planes = list(data.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    hosts = [plane for plane in planes if plane.name.startswith("/host:CPU")]
    for plane in (*sorted(devices, key=lambda plane: plane.name), *hosts):
        intervals = list(_intervals(plane))
        if intervals:
            return device_use(intervals)
    names = [f"{p.name}: {[line.name for line in p.lines][:9]}" for p in planes]
    raise ValueError(f"{files[-1]}: no line shows work of a device: {names}")


def _intervals(plane: Any) -> Iterable[tuple[float, float]]:
    for line in plane.lines:
        if line.name.startswith(DEVICE_LINES):
            for event in line.events:
                if event.duration_ns > 0:
                    yield event.start_ns, event.start_ns + event.duration_ns
