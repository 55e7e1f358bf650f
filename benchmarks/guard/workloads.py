"""Counts of the host's work for a few small workloads, and of its CPU programs."""

from typing import Any

import jax
import numpy as np

from benchmarks.guard.counts import program_counts
from tests.engines import drain, make_engine, request

VOCAB = 331
WORKLOADS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "seed": 1},
    "rules": {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.1, "seed": 1},
    "logprobs": {"temperature": 0, "logprobs": 3},
    "prompt_logprobs": {"temperature": 0, "prompt_logprobs": 2},
    "two_outputs": {"temperature": 0.8, "n": 2, "seed": 1},
}
"""Sampling parameters of five requests of growing length, by name."""

PER_RUN = ("steps", "dispatches", "host_to_device_copies", "device_to_host_copies")


def cpu_counts() -> dict[str, dict[str, int]]:
    """Counts of every program of a tiny engine, and of what each workload costs."""
    engine: Any = make_engine(block_size=16)
    engine.programs.wait()
    counts: dict[str, dict[str, int]] = {
        f"cpu {kind} {size}": program_counts(engine.programs.get(kind, size))
        for kind, size in engine.programs.all_keys()
    }
    weights = engine.weights
    leaves = len(jax.tree.leaves((weights, engine.state)))
    counts["call"] = {"leaves": leaves, "programs": len(engine.programs.all_keys())}
    for name, params in WORKLOADS.items():
        counts[f"workload {name}"] = _run(engine, params)
    engine.close()
    return counts


def _run(engine: Any, params: dict[str, Any]) -> dict[str, int]:
    compiled: list[str] = []

    def record(event: str, *_: object, **__: object) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    engine.reset_prefix_cache()
    before = [getattr(engine.metrics, name) for name in PER_RUN]
    jax.monitoring.register_event_duration_secs_listener(record)
    rng = np.random.default_rng(0)
    for i in range(5):
        prompt = rng.integers(3, VOCAB, 20 + 9 * i)
        engine.add(request(i, prompt, max_tokens=8 + i, ignore_eos=True, **params))
    drain(engine)
    jax.monitoring.unregister_event_duration_listener(record)
    after = [getattr(engine.metrics, name) for name in PER_RUN]
    counts = {n: b - a for n, a, b in zip(PER_RUN, before, after, strict=True)}
    return counts | {"compiles": len(compiled)}
