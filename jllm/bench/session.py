"""An engine in this process, to be measured: made from flags, with its counters."""

import argparse
import contextlib
import dataclasses
import shutil
import tempfile
import threading
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jllm.bench.limits import MachineLimits, ModelCost, measure_limits
from jllm.bench.statistics import percentile
from jllm.config import EngineConfig
from jllm.errors import InvalidRequestError
from jllm.flags import add_flags, given_values

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
SAMPLE_SECONDS = 0.02
COUNTERS = (
    "steps",
    "mixed_steps",
    "dispatches",
    "host_to_device_copies",
    "device_to_host_copies",
    "scheduled_rows",
    "scheduled_tokens",
    "padded_tokens",
    "launch_seconds",
)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a model and of the engine."""
    group = parser.add_argument_group("model and engine")
    group.add_argument(
        "--model", help="directory or Hugging Face id; none is the embedded model"
    )
    group.add_argument(
        "--random-weights",
        metavar="CONFIG",
        help="config.json, or its folder: random weights of that shape, no tokenizer",
    )
    add_flags(
        group,
        EngineConfig,
        leave_out=("model",),
        renamed={"seed": "engine-seed"},
    )


@contextlib.contextmanager
def engine_config(options: argparse.Namespace) -> Generator[EngineConfig]:
    """The engine options that the flags give; checked before JAX is imported.

    Raises:
        InvalidRequestError: Both a model and random weights are named.
    """
    given = given_values(options, EngineConfig)
    if options.random_weights is None:
        yield EngineConfig(model=options.model, **given)
        return
    if options.model is not None:
        raise InvalidRequestError("give either --model or --random-weights")
    from jllm.weights.hub import read_json

    path = Path(options.random_weights).expanduser()
    given |= {"load_format": "random", "skip_tokenizer_init": True}
    if path.is_dir():
        yield EngineConfig(model=str(path), **given)
        return
    read_json(path)
    with tempfile.TemporaryDirectory(prefix="jllm-bench-") as folder:
        shutil.copy(path, Path(folder) / "config.json")
        yield EngineConfig(model=folder, **given)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelShape:
    """What the figures need to know of a model.

    Attributes:
        name: For the record.
        vocab_size: Token ids.
        dtype: Type of weights and cache.
        cost: Bytes and operations; None for shapes that are not counted.
    """

    name: str
    vocab_size: int
    dtype: str
    cost: ModelCost | None

    @classmethod
    def of(cls, config: EngineConfig, name: str | None = None) -> "ModelShape":
        """Reads the model's settings; loads no weights."""
        from jllm.engine.create import DEFAULT_MODEL
        from jllm.engine.options import saved_dtype
        from jllm.models.hf_config import read_integer
        from jllm.weights.hub import resolve_model

        files = resolve_model(
            config.model or str(DEFAULT_MODEL),
            revision=config.revision,
            with_weights=False,
        )
        is_auto = config.dtype == "auto"
        dtype = saved_dtype(files.config) if is_auto else config.dtype
        return cls(
            name=name or files.path.name,
            vocab_size=read_integer(files.config, "vocab_size"),
            dtype=dtype,
            cost=ModelCost.from_config(files.config, dtype),
        )


@dataclasses.dataclass(slots=True)
class CompileCounter:
    """Counts compilations of the process while it is entered.

    Attributes:
        count: Programs compiled, or read from the cache of compiled programs.
        seconds: Time that took, summed over threads.
    """

    count: int = 0
    seconds: float = 0.0

    def _note(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs

    def __enter__(self) -> "CompileCounter":
        from jax import monitoring

        monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        from jax import monitoring

        monitoring.unregister_event_duration_listener(self._note)


def engines_of(llm: Any) -> tuple[Any, ...]:
    """The engines under an `LLM`: one, or its replicas."""
    return getattr(llm.engine, "engines", (llm.engine,))


def read_counters(llm: Any) -> dict[str, float]:
    """Counters of all engines since they were made."""
    engines = engines_of(llm)
    counters: dict[str, float] = {
        name: sum(getattr(engine.metrics, name) for engine in engines)
        for name in COUNTERS
    }
    counters["preemptions"] = sum(e.scheduler.num_preemptions for e in engines)
    return counters


def step_figures(
    before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, float]:
    """What the engine did between two readings, per step where that says more."""
    change = {name: after[name] - before[name] for name in after}
    steps = max(change["steps"], 1)
    padded = max(change["padded_tokens"], 1)
    return {
        "steps": int(change["steps"]),
        "rows_per_step": change["scheduled_rows"] / steps,
        "mixed_share": change["mixed_steps"] / steps,
        "padding_share": 1 - change["scheduled_tokens"] / padded,
        "computed_tokens": int(change["scheduled_tokens"]),
        "dispatches_per_step": change["dispatches"] / steps,
        "uploads_per_step": change["host_to_device_copies"] / steps,
        "downloads_per_step": change["device_to_host_copies"] / steps,
        "launch_us_per_step": 1e6 * change["launch_seconds"] / steps,
        "preemptions": int(change["preemptions"]),
    }


class Sampler:
    """Looks at the schedulers every 20 ms from a thread of its own.

    It only reads, without a lock: a sample may mix two steps.
    """

    def __init__(self, llm: Any) -> None:
        """Starts nothing yet."""
        self._schedulers = [engine.scheduler for engine in engines_of(llm)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jllm-bench-sampler")
        self._running: list[int] = []
        self._waiting: list[int] = []
        self._pool_use: list[float] = []
        self._waste: list[float] = []

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def figures(self) -> dict[str, float]:
        """Means and largest values; empty when nothing was sampled."""
        if not self._running:
            return {}
        figures = {
            "mean_running": sum(self._running) / len(self._running),
            "max_running": max(self._running),
            "mean_waiting": sum(self._waiting) / len(self._waiting),
            "max_waiting": max(self._waiting),
            "pool_peak": max(self._pool_use),
        }
        if self._waste:
            figures["kv_waste"] = sum(self._waste) / len(self._waste)
            figures["kv_waste_p99"] = percentile(self._waste, 99)
        return figures

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        running = [list(scheduler.running) for scheduler in self._schedulers]
        self._running.append(sum(len(rows) for rows in running))
        self._waiting.append(sum(s.num_waiting for s in self._schedulers))
        num_blocks = sum(s.pool.num_blocks for s in self._schedulers)
        free = sum(s.num_free_blocks for s in self._schedulers)
        self._pool_use.append(1 - free / num_blocks)
        for scheduler, rows in zip(self._schedulers, running, strict=True):
            self._note_waste(scheduler.config.block_size, rows)

    def _note_waste(self, block_size: int, rows: Sequence[Any]) -> None:
        """Slots reserved but unused, of those reserved, row by row.

        A block that rows share counts for each of them, full as it is.
        """
        used = sum(row.num_computed_tokens for row in rows)
        blocks = sum(len(row.block_ids) + row.num_reserved_blocks for row in rows)
        if blocks and used:
            self._waste.append(max(0.0, 1 - used / (blocks * block_size)))


def device_limits(config: EngineConfig) -> MachineLimits:
    """Measured limits of the devices that the engine will use."""
    num_devices = config.tensor_parallel_size * config.data_parallel_size
    return measure_limits().times(num_devices)
