"""Checks and times every kernel on the device at hand; one line of JSON per figure.

    python -m benchmarks.kernels.run [--operations paged_attention ...] [--cases TEXT]
        [--no-peers] [--record] [--small]

Correctness comes first: fresh random inputs, against the reference in float32 on the
same device; `make test-kernels` holds the small shapes against float64. Then times,
beside the copy bandwidth and the matrix rate that this very device has just shown, and
beside other kernels for the same work in the same run. `--small` takes the small cases
only: a trial of the script on a machine without an accelerator.
"""

import argparse
import importlib
import pathlib
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.kernels import limits, peers
from benchmarks.kernels.timing import Timing, seconds_per_call
from pallas_kernels.common.cases import KernelCase
from pallas_kernels.common.target import Target

KERNELS = pathlib.Path(__file__).parents[2] / "pallas_kernels"
TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
SMALL_BYTES, SMALL_FLOPS = 1 << 22, 1 << 29


def operations() -> list[str]:
    """Folders of operations."""
    return sorted(f.name for f in KERNELS.iterdir() if (f / "api.py").is_file())


def cases_of(operation: str) -> list[KernelCase]:
    """The cases of an operation at the size of real models."""
    module = importlib.import_module(f"pallas_kernels.{operation}.cases")
    return module.kernel_cases()


def largest_error(found: Any, expected: Any) -> float:
    """Largest difference of two results, relative to the largest value of each array.

    Infinite where one of them is finite and the other is not.
    """
    worst = 0.0
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        a, b = (np.asarray(x.astype(jnp.float32), np.float64) for x in (one, other))
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return float("inf")
        a, b = np.nan_to_num(a), np.nan_to_num(b)
        largest = max(float(np.abs(b).max(initial=0)), 1.0)
        worst = max(worst, float(np.abs(a - b).max(initial=0)) / largest)
    return worst


def tolerance_of(case: KernelCase) -> float:
    """Error allowed, by the narrowest float type among the arguments."""
    names = {str(a.dtype) for a in case.arguments}
    return max((TOLERANCE[n] for n in names if n in TOLERANCE), default=3e-2)


def check(case: KernelCase, implementation: str, target: Target) -> float:
    """Largest error of an implementation against the reference."""
    arrays = case.make_arguments(np.random.default_rng())

    def run(name: str) -> Any:
        # A new copy each time: arguments may be donated.
        copies = [jnp.asarray(a) for a in arrays]
        function = partial(case.function, implementation=name, target=target)
        return jax.jit(function, donate_argnums=case.donated)(*copies)

    return largest_error(run(implementation), run("reference"))


def figures(case: KernelCase, timing: Timing, limit: Mapping[str, float]) -> dict:
    """Rates of a timing, and their shares of what the device can do."""
    bandwidth = case.num_bytes / timing.median
    rate = case.num_flops / timing.median
    return {
        "seconds": timing.median,
        "seconds_low": timing.low,
        "seconds_high": timing.high,
        "bytes_per_second": bandwidth,
        "flops_per_second": rate,
        "bandwidth_share": bandwidth / limit["copy_bandwidth"],
        "matrix_share": rate / limit["matrix_rate"],
    }


def runs(
    case: KernelCase, target: Target, *, with_peers: bool
) -> Iterator[tuple[str, Any]]:
    """Name and timing, or the reason why there is none, of all that can do a case."""
    own = [n for n in case.implementations if n.split("_")[0] == target.platform]
    drawn = case.make_arguments(np.random.default_rng(0))
    arrays = tuple(jnp.asarray(a) for a in drawn)
    for name in [*own, *(["blocked"] if "blocked" in case.implementations else [])]:
        function = partial(case.function, implementation=name, target=target)
        yield name, partial(seconds_per_call, function, arrays, case.donated)
    reference = partial(case.function, implementation="reference", target=target)
    yield "reference", partial(seconds_per_call, reference, arrays, case.donated)
    if with_peers and target.platform == "gpu":
        for name, (function, arguments) in peers.jax_peers(case, arrays).items():
            yield name, partial(seconds_per_call, function, arguments)
        if case.operation in ("paged_attention", "ragged_attention"):
            for name, peer in peers.TORCH_PEERS.items():
                yield name, lambda peer=peer: Timing(*[peer(case, arrays)] * 3)


def measure(case: KernelCase, arguments: argparse.Namespace, limit: Mapping) -> list:
    """All lines of a case; what fails is a line with its error."""
    target, lines = Target.default(), []
    for name, time_it in runs(case, target, with_peers=arguments.peers):
        line: dict[str, Any] = {
            "operation": case.operation,
            "case": case.name,
            "implementation": name,
        }
        try:
            if name in case.implementations:
                line["error"] = check(case, name, target)
                line["is_correct"] = line["error"] <= tolerance_of(case)
            line |= figures(case, time_it(), limit)
        except Exception as error:  # noqa: BLE001  whatever a kernel may raise
            line["failure"] = f"{type(error).__name__}: {error}"[:500]
        print(table_row(line), flush=True)
        lines.append(line)
    return lines


def table_row(line: Mapping[str, Any]) -> str:
    """A line for people."""
    head = f"{line['operation']:17} {line['case']:32} {line['implementation']:20}"
    if "failure" in line:
        return f"{head} {line['failure'][:90]}"
    mark = {True: "ok", False: "WRONG"}.get(line.get("is_correct"), "")
    return (
        f"{head} {1e6 * line['seconds']:9.1f} us "
        f"{line['bytes_per_second'] / 1e12:6.2f} TB/s {line['bandwidth_share']:4.0%} "
        f"{line['flops_per_second'] / 1e12:7.1f} TFLOP/s {line['matrix_share']:4.0%} "
        f"{mark}"
    )


def main() -> None:
    """Measures what the arguments ask for; exits with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", nargs="+", default=operations())
    parser.add_argument("--cases", default="", help="part of the names of the cases")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    limit = {
        "copy_bandwidth": limits.copy_bandwidth(1 << (24 if arguments.small else 32)),
        "matrix_rate": limits.matrix_rate(256 if arguments.small else 8192),
    }
    device = jax.devices()[0].device_kind
    print(
        f"{device}: copies {limit['copy_bandwidth'] / 1e12:.2f} TB/s, "
        f"bfloat16 products {limit['matrix_rate'] / 1e12:.1f} TFLOP/s"
    )
    is_wrong = False
    for operation in arguments.operations:
        for case in cases_of(operation):
            size = max(case.num_bytes / SMALL_BYTES, case.num_flops / SMALL_FLOPS)
            if arguments.cases not in case.name or (arguments.small and size > 1):
                continue
            lines = measure(case, arguments, limit)
            is_wrong |= any(
                line.get("is_correct") is False
                or (
                    "failure" in line and line["implementation"] in case.implementations
                )
                for line in lines
            )
            if arguments.record:
                facts = limit | {"device": device}
                record.append("kernels", [line | facts for line in lines])
    sys.exit(is_wrong)


if __name__ == "__main__":
    main()
