"""When requests arrive: all at once, or at random with a given rate."""

import dataclasses
import math
import random
from collections.abc import Sequence

from jllm.errors import InvalidRequestError

RAMP_UPS = ("linear", "exponential")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """An arrival process; see `arrival_times`.

    Attributes:
        request_rate: Mean requests per second; infinite is all at once.
        burstiness: Shape of the gamma distribution of the times between arrivals: 1 is
            a Poisson process, less is burstier, more is more even.
        ramp_up_strategy: How the rate grows over the run, linear or exponential; none
            keeps it.
        ramp_up_start_rps: Rate at the start of a ramp.
        ramp_up_end_rps: Rate at its end.
    """

    request_rate: float = math.inf
    burstiness: float = 1.0
    ramp_up_strategy: str | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None

    def __post_init__(self) -> None:
        """Checks the ranges; raises `InvalidRequestError` naming field and bound."""
        for name in ("request_rate", "burstiness"):
            if not getattr(self, name) > 0:
                raise InvalidRequestError(
                    f"{name}={getattr(self, name)!r} must be above 0"
                )
        if math.isinf(self.burstiness):
            raise InvalidRequestError("burstiness=inf must be finite")
        rates = (self.ramp_up_start_rps, self.ramp_up_end_rps)
        if self.ramp_up_strategy is None:
            if rates != (None, None):
                raise InvalidRequestError(
                    "ramp_up_start_rps and ramp_up_end_rps need ramp_up_strategy"
                )
            return
        if self.ramp_up_strategy not in RAMP_UPS:
            raise InvalidRequestError(
                f"ramp_up_strategy={self.ramp_up_strategy!r} must be one of "
                f"{', '.join(RAMP_UPS)}"
            )
        for name in ("ramp_up_start_rps", "ramp_up_end_rps"):
            rate = getattr(self, name)
            if rate is None or not 0 < rate < math.inf:
                raise InvalidRequestError(f"{name}={rate!r} must be above 0, finite")
        if math.isfinite(self.request_rate):
            raise InvalidRequestError(
                f"request_rate={self.request_rate!r} must not be given with a ramp"
            )


def arrival_times(arrivals: Arrivals, count: int, seed: int) -> list[float]:
    """Seconds from the start at which each of `count` requests is sent, ascending."""
    if arrivals.ramp_up_strategy is None and math.isinf(arrivals.request_rate):
        return [0.0] * count
    rng = random.Random(seed)
    times: list[float] = []
    now = 0.0
    for rate in _rates(arrivals, count):
        # The mean of a gamma distribution is shape times scale.
        shape = arrivals.burstiness
        now += rng.gammavariate(shape, 1 / (rate * shape))
        times.append(now)
    return times


def trace_times(recorded: Sequence[float], speed: float = 1.0) -> list[float]:
    """Times of a trace from its first arrival on, replayed `speed` times as fast."""
    first = recorded[0] if recorded else 0.0
    return [(time - first) / speed for time in recorded]


def _rates(arrivals: Arrivals, count: int) -> list[float]:
    """The mean rate at each arrival."""
    start, end = arrivals.ramp_up_start_rps, arrivals.ramp_up_end_rps
    if start is None or end is None:
        return [arrivals.request_rate] * count
    parts = [i / max(count - 1, 1) for i in range(count)]
    if arrivals.ramp_up_strategy == "linear":
        return [start + (end - start) * part for part in parts]
    return [start * (end / start) ** part for part in parts]
