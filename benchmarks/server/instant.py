"""A server whose engine computes nothing: `python -m benchmarks.server.instant`.

Arguments: a JSON object with `period`, the seconds between two steps, `times`, the file
that gets the moment of every step, and fields of `ServerConfig`.

Every running sequence gets one token a step. The token tells the step, so that who gets
it knows when it was made: both processes read the same monotonic clock.
"""

import array
import dataclasses
import json
import logging
import sys
import time
import unittest.mock
from pathlib import Path

import jllm
from jllm import AsyncLLM, EngineConfig, EngineStats
from jllm.engine.admission import Limits, validate
from jllm.engine.engine import ModelInfo
from jllm.types import EngineRequest, StepOutputs, TokenOutput
from server.config import ServerConfig
from server.serving import serve

FIRST_TOKEN, NUM_TOKENS = 400, 1024
"""Whole words of the embedded model's vocabulary."""


def token_of(step: int) -> int:
    """The token that all sequences get in a step."""
    return FIRST_TOKEN + step % NUM_TOKENS


@dataclasses.dataclass
class Row:
    """A running sequence: tokens still to come, and whether any has."""

    left: int
    has_begun: bool = False


class InstantEngine:
    """Gives tokens at a fixed pace, whatever is asked."""

    def __init__(self, period: float, times: Path) -> None:
        """Begins with nothing to do."""
        self.limits = Limits(1536, 8192, 20, (1,), 64)
        self.info = ModelInfo(Path(jllm.__file__).parent / "default_model", {})
        self._period = period
        self._file = times
        self._times = array.array("d")
        self._next = time.monotonic()
        self._rows: dict[tuple[str, int], Row] = {}

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._rows)

    def add(self, request: EngineRequest) -> None:
        """Begins with a request."""
        validate(request, self.limits)
        for index in range(request.params.n):
            self._rows[request.request_id, index] = Row(request.params.max_tokens or 16)

    def abort(self, request_id: str) -> None:
        """Forgets a request."""
        for key in [key for key in self._rows if key[0] == request_id]:
            del self._rows[key]

    def abort_sequence(self, request_id: str, index: int) -> None:
        """Forgets a sequence."""
        self._rows.pop((request_id, index), None)

    def step(self) -> StepOutputs:
        """Waits for the next beat, then gives every sequence a token."""
        now = time.monotonic()
        self._next = max(self._next + self._period, now)
        time.sleep(self._next - now)
        token = token_of(len(self._times))
        self._times.append(time.monotonic())
        keys, others = [], []
        for key, row in list(self._rows.items()):
            row.left -= 1
            if row.left and row.has_begun:
                keys.append(key)
                continue
            row.has_begun = True
            reason = None if row.left else "length"
            others.append(TokenOutput(*key, (token,), finish_reason=reason))
            if reason:
                del self._rows[key]
        return StepOutputs(keys, [token] * len(keys), others)

    def stats(self) -> EngineStats:
        """How many run."""
        return EngineStats(num_running=len(self._rows))

    def reset_prefix_cache(self) -> bool:
        """There is none."""
        return True

    def close(self) -> None:
        """Writes the moments of the steps."""
        self._file.write_bytes(self._times.tobytes())


def main() -> int:
    """Serves until a signal."""
    options = json.loads(sys.argv[1])
    engine = InstantEngine(options.pop("period"), Path(options.pop("times")))
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def make_llm(config: EngineConfig) -> AsyncLLM:
        name = "jllm.async_llm.create_engine"
        with unittest.mock.patch(name, return_value=engine):
            return AsyncLLM.from_engine_config(config)

    return serve(EngineConfig(), ServerConfig(**options), make_llm)


if __name__ == "__main__":
    sys.exit(main())
