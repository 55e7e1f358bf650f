"""Chooses the implementation of an operation by device, or obeys the caller."""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import itertools
import logging
from collections.abc import Generator
from typing import Any, Literal

from pallas_kernels.common.target import Target

Implementation = Literal[
    "auto", "reference", "blocked", "gpu_triton", "gpu_mosaic", "tpu"
]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Fallback:
    """An accelerator's kernel that could not be used.

    Attributes:
        operation: Name of the operation.
        wanted: Implementation that would have been used.
        used: The one that is used in its place.
        reason: Why.
    """

    operation: str
    wanted: str
    used: str
    reason: str


_collected: contextvars.ContextVar[list[Fallback] | None] = contextvars.ContextVar(
    "fallbacks", default=None
)


@contextlib.contextmanager
def collect_fallbacks() -> Generator[list[Fallback]]:
    """Gathers the fall-backs of all operations traced in this context."""
    found: list[Fallback] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


def _report(fallback: Fallback) -> None:
    _log_once(fallback)
    found = _collected.get()
    if found is not None:
        found.append(fallback)


@functools.cache
def _log_once(fallback: Fallback) -> None:
    logger.warning(
        "%s: %s cannot be used here (%s); using %s",
        fallback.operation,
        fallback.wanted,
        fallback.reason,
        fallback.used,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """The implementations of one operation.

    The implementation `x` of the operation `f` of a folder is the function `f_x` of its
    module `x`, imported when it is first used. All of them take the arguments of the
    reference, and those for an accelerator a `target` besides. They raise
    NotImplementedError for what they cannot do.

    Attributes:
        name: Name of the public function.
        folder: Folder of the operation, a package of `pallas_kernels`.
        cpu: Implementations for a CPU, the best first.
        gpu: Implementations for a GPU, the best first.
        tpu: Implementations for a TPU, the best first.
    """

    name: str
    folder: str
    cpu: tuple[Implementation, ...] = ("reference",)
    gpu: tuple[Implementation, ...] = ("gpu_triton", "reference")
    tpu: tuple[Implementation, ...] = ("tpu", "reference")

    def run(
        self,
        implementation: Implementation,
        target: Target | None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """Runs the implementation asked for, or with "auto" the best possible one.

        Raises:
            ValueError: There is no such implementation, or it is for other devices.
            NotImplementedError: The one asked for cannot do this.
        """
        target = target or Target.default()
        if implementation != "auto":
            self._check(implementation, target)
            return self._call(implementation, target, *arguments, **options)
        choices: tuple[Implementation, ...] = getattr(self, target.platform)
        for wanted, next_choice in itertools.pairwise(choices):
            try:
                return self._call(wanted, target, *arguments, **options)
            except NotImplementedError as error:
                _report(Fallback(self.name, wanted, next_choice, str(error)))
        return self._call(choices[-1], target, *arguments, **options)

    def first_choice(
        self, implementation: Implementation, target: Target | None
    ) -> tuple[Implementation, Target]:
        """The implementation that `run` tries first, and its target."""
        target = target or Target.default()
        if implementation != "auto":
            self._check(implementation, target)
            return implementation, target
        choices: tuple[Implementation, ...] = getattr(self, target.platform)
        return choices[0], target

    def _check(self, implementation: str, target: Target) -> None:
        known = {*self.cpu, *self.gpu, *self.tpu, "reference"}
        if implementation not in known:
            names = ", ".join(["auto", *sorted(known)])
            raise ValueError(
                f"implementation={implementation!r} of {self.name} must be one of "
                f"{names}"
            )
        platform = implementation.partition("_")[0]
        if platform in ("gpu", "tpu") and platform != target.platform:
            raise ValueError(
                f"implementation={implementation!r} of {self.name} needs a "
                f"{platform.upper()}; the target is a {target.platform.upper()}"
            )

    def _call(
        self, implementation: str, target: Target, *arguments: Any, **options: Any
    ) -> Any:
        module = importlib.import_module(
            f"pallas_kernels.{self.folder}.{implementation}"
        )
        function = getattr(module, f"{self.name}_{implementation}")
        if implementation.startswith(("gpu_", "tpu")):
            options["target"] = target
        return function(*arguments, **options)
