"""`jllm bench startup`: from the start of a process to its first token, and to all.

Each measurement is a process of its own: cold with an empty folder for compiled
programs, warm with a folder that another start has filled, exported with executables
that another start has written.
"""

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from jllm.bench import plot, report
from jllm.bench.limits import ITEM_BYTES
from jllm.bench.session import ModelShape, add_model_flags, engine_config
from jllm.bench.statistics import percentile, spread
from jllm.config import EngineConfig
from jllm.errors import EngineStoppedError, InvalidRequestError

KINDS = ("cold", "warm", "exported")
STAGES = {
    "imported": "Python and its imports",
    "loaded": "engine ready: weights, first programs, pool",
    "first_token": "first token",
    "compiled": "all programs ready",
}
DURATIONS = {
    "trace_seconds": "tracing, summed over threads",
    "lower_seconds": "lowering, summed over threads",
    "compile_seconds": "compiling or reading compiled programs, summed",
}
TIME_LIMIT = 3600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this verb."""
    group = parser.add_argument_group("measurement")
    group.add_argument("--num-iters-cold", type=int, default=3, metavar="N")
    group.add_argument("--num-iters-warmup", type=int, default=1, metavar="N")
    group.add_argument("--num-iters-warm", type=int, default=3, metavar="N")
    group.add_argument("--num-iters-exported", type=int, default=3, metavar="N")
    group.add_argument("--input-len", type=int, default=32, metavar="N")
    add_model_flags(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints; returns the result for `--json`."""
    counts = [f"num_iters_{kind}" for kind in KINDS]
    for name in (*counts, "num_iters_warmup", "input_len"):
        low = int(name == "input_len")
        if getattr(options, name) < low:
            raise InvalidRequestError(
                f"{name}={getattr(options, name)} must be at least {low}"
            )
    if not any(getattr(options, name) for name in counts):
        raise InvalidRequestError(f"{', '.join(counts)} are all 0")
    with engine_config(options) as config:
        shape = ModelShape.of(config, options.random_weights)
        measured = _measure(config, options)
    print(
        f"{shape.name}, {shape.dtype}; seconds from the start of the process, medians"
    )
    results = {name: _medians(runs) for name, runs in measured.items() if runs}
    _print(results, shape)
    if options.plot:
        series = {
            name: [(key, result[key]) for key in STAGES]
            for name, result in results.items()
        }
        panels = [
            plot.Panel(name, "", "seconds", {name: points}, style="bars")
            for name, points in series.items()
        ]
        plot.draw(options.plot, panels)
    return {
        "benchmark": "startup",
        "model": shape.name,
        "dtype": shape.dtype,
        "config": dataclasses.asdict(config),
        "results": results,
        "runs": measured,
    }


def _measure(
    config: EngineConfig, options: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Each kind of start so many times, in turns; folders are removed afterwards."""
    if config.executables != "auto" or config.compilation_cache_dir is not None:
        raise InvalidRequestError(
            "executables and compilation_cache_dir are chosen by the benchmark"
        )
    length = options.input_len
    counts: dict[str, int] = {
        kind: getattr(options, f"num_iters_{kind}") for kind in KINDS
    }
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with contextlib.ExitStack() as folders:
        cache, executables = (folders.enter_context(_folder()) for _ in range(2))
        configs = {
            "warm": dataclasses.replace(config, compilation_cache_dir=cache),
            "exported": dataclasses.replace(
                config, compilation_cache_dir=cache, executables=executables
            ),
        }
        for kind, own in configs.items():
            # The first fills the folder; the next find in it what they need.
            for _ in range(1 + options.num_iters_warmup if counts[kind] else 0):
                _start(own, length)
        # In turns, so that a slow spell of the machine meets all kinds.
        for turn in range(max(counts.values())):
            for kind in KINDS:
                if turn < counts[kind]:
                    with _folder() as empty:
                        cold = dataclasses.replace(config, compilation_cache_dir=empty)
                        runs[kind].append(_start(configs.get(kind, cold), length))
    return runs


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="jllm-programs-")


def _start(config: EngineConfig, input_len: int) -> dict[str, float]:
    """Runs one process; returns the seconds at which it reached each stage.

    Raises:
        EngineStoppedError: It failed; says how.
    """
    fields = dataclasses.asdict(config)
    settings = json.dumps({"config": fields, "input_len": input_len})
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "jllm.bench.first_token", settings],
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    if done.returncode:
        reason = " ".join(done.stderr.strip().splitlines()[-1:])
        raise EngineStoppedError(f"a process ended with {done.returncode}: {reason}")
    stages: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    # The monotonic clock of Linux is the same in all processes.
    return {
        name: value - began if name in STAGES else value
        for name, value in stages.items()
    }


def _medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    medians = {key: percentile([run[key] for run in runs], 50) for key in runs[0]}
    return {**medians, "spread": spread([run["first_token"] for run in runs])}


def _print(results: dict[str, dict[str, float]], shape: ModelShape) -> None:
    head = ["", *results]
    rows = [
        [text, *(f"{result[key]:.2f}" for result in results.values())]
        for key, text in {**STAGES, **DURATIONS}.items()
    ]
    rows.append(
        [
            "programs compiled or read",
            *(f"{r['programs']:.0f}" for r in results.values()),
        ]
    )
    rows.append(
        [
            "of them from the cache",
            *(f"{r['cache_hits']:.0f}" for r in results.values()),
        ]
    )
    if shape.cost is not None:
        size = ITEM_BYTES[shape.dtype] * (
            shape.cost.layer_weights + shape.cost.head_weights
        )
        speeds = (size / 1e9 / (r["loaded"] - r["imported"]) for r in results.values())
        rows.append(
            ["GB of weights per second of loading", *(f"{s:.2f}" for s in speeds)]
        )
    rows.append(
        ["spread of the first token", *(f"{r['spread']:.1%}" for r in results.values())]
    )
    report.print_table(head, rows)
