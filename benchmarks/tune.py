"""Finds the tile sizes of the kernels on the device at hand, and stores them as data.

    python -m benchmarks.tune [--operations paged_attention ...] [--cases TEXT]

From the sizes in use it goes to half or double of each in turn as long as that is
faster by three percent and as correct as before. What wins is written to
`pallas_kernels/<operation>/tuning/<device>.json`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels.run import cases_of, check, operations, tolerance_of
from benchmarks.kernels.timing import seconds_per_call
from pallas_kernels.common.cases import KernelCase
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import Sizes, store_sizes, try_sizes

WORTHWHILE = 0.97
"""A size is changed if that brings the time below this share."""

Key = tuple[str, str]


def time_with(
    case: KernelCase,
    implementation: str,
    target: Target,
    sizes: Mapping[Key, Sizes],
) -> float:
    """Seconds with some sizes; infinite where they fail or give a wrong result."""
    drawn = case.make_arguments(np.random.default_rng(0))
    arrays = [jnp.asarray(array) for array in drawn]
    with try_sizes(sizes):
        try:
            if check(case, implementation, target) > tolerance_of(case):
                return float("inf")
            function = partial(
                case.function, implementation=implementation, target=target
            )
            return seconds_per_call(function, arrays, case.donated).median
        except Exception as error:  # noqa: BLE001  a compiler refuses in many ways
            print(f"  {dict(sizes)}: {type(error).__name__}", flush=True)
            return float("inf")


def sizes_in_use(
    case: KernelCase, implementation: str, target: Target
) -> dict[Key, Sizes]:
    """The sizes that a case asks for now, by folder and key."""
    function = partial(case.function, implementation=implementation, target=target)
    with try_sizes({}) as trial:
        jax.eval_shape(function, *case.arguments)
    return dict(trial.asked)


def neighbours(sizes: Mapping[Key, Sizes]) -> Iterator[dict[Key, Sizes]]:
    """Each size halved and doubled, one at a time."""
    for key, own in sizes.items():
        for name, value in own.items():
            for other in (value // 2, value * 2):
                if other >= 1:
                    yield {**sizes, key: {**own, name: other}}


def descend(
    start: dict[Key, Sizes], seconds: Callable[[dict[Key, Sizes]], float]
) -> tuple[dict[Key, Sizes], float, float]:
    """Best sizes found, their seconds, and those of the start."""
    best, first = start, seconds(start)
    fastest, is_better = first, True
    while is_better:
        is_better = False
        for candidate in neighbours(best):
            found = seconds(candidate)
            if found < WORTHWHILE * fastest:
                best, fastest, is_better = candidate, found, True
                break
    return best, fastest, first


def main() -> None:
    """Tunes what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", nargs="+", default=operations())
    parser.add_argument("--cases", default="", help="part of the names of the cases")
    arguments = parser.parse_args()
    target = Target.default()
    if target.platform == "cpu":
        sys.exit("there is no accelerator here")
    for operation in arguments.operations:
        for case in cases_of(operation):
            for implementation in case.implementations:
                if (
                    implementation.startswith(target.platform)
                    and arguments.cases in case.name
                ):
                    start = sizes_in_use(case, implementation, target)
                    seconds = partial(time_with, case, implementation, target)
                    best, fastest, first = descend(start, seconds)
                    print(
                        f"{operation} {case.name} {implementation}: "
                        f"{1e6 * first:.1f} -> {1e6 * fastest:.1f} us {best}"
                    )
                    for (folder, key), sizes in best.items():
                        if sizes != start[folder, key]:
                            store_sizes(folder, target.name, key, sizes)


if __name__ == "__main__":
    main()
