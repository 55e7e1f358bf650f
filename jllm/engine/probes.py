"""From what a request captures and edits to what is compiled, and what is input."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jllm.engine.capture import CapturedTokens
from jllm.engine.probed_steps import EditGroup, EditPoint, ProbeSet
from jllm.errors import InvalidRequestError
from jllm.models.probe import matching
from jllm.probes import Probes


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class JobEdits:
    """The edits of one request.

    Attributes:
        group: What is compiled.
        spans: i32[N, 2] first edited position, and the one after the last, per edit.
        arguments: Of the edits that take one.
    """

    group: EditGroup
    spans: np.ndarray
    arguments: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ResolvedProbes:
    """What a request captures and edits, in a model's own names.

    Attributes:
        probes: What its programs need.
        edits: Its edits; None where it has none.
    """

    probes: ProbeSet
    edits: JobEdits | None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ProbedJob:
    """What a probed sequence has beside others.

    Attributes:
        captured: What has been captured for it; None where it captures nothing.
        edits: Its edits; None where it has none.
    """

    captured: CapturedTokens | None
    edits: JobEdits | None


def resolve(probes: Probes, activations: Sequence[str]) -> ResolvedProbes:
    """Finds the activations that a request means.

    Raises:
        InvalidRequestError: A pattern matches none, or there are none to be had.
    """
    if not activations:
        raise InvalidRequestError(
            "this engine neither captures nor edits activations: that needs "
            "pipeline_parallel_size=1 and num_hosts=1",
            parameter="capture" if probes.capture else "edit",
        )
    names = {
        name
        for pattern in probes.capture
        for name in _matching(pattern, activations, "capture")
    }
    points: list[EditPoint] = []
    for pattern, edit in probes.edit.items():
        _matching(pattern, activations, "edit")
        argument = edit.argument
        shape = None if argument is None else argument.shape
        dtype = "" if argument is None else argument.dtype.name
        points.append(EditPoint(pattern, edit.function, shape, dtype))
    edits = list(probes.edit.values())
    group = tuple(points)
    return ResolvedProbes(
        probes=ProbeSet(
            capture=tuple(name for name in activations if name in names),
            groups=(group,) if group else (),
        ),
        edits=JobEdits(
            group=group,
            spans=np.array([edit.span for edit in edits], np.int32),
            arguments=tuple(
                edit.argument for edit in edits if edit.argument is not None
            ),
        )
        if edits
        else None,
    )


def make_probed(probes: Probes, activations: Sequence[str]) -> ProbedJob:
    """What one sequence of a request begins with."""
    found = resolve(probes, activations)
    names = found.probes.capture
    return ProbedJob(CapturedTokens(names) if names else None, found.edits)


def _matching(pattern: str, activations: Sequence[str], field: str) -> list[str]:
    try:
        return matching(pattern, activations, field)
    except ValueError as error:
        raise InvalidRequestError(str(error), parameter=field) from error
