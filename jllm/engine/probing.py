"""Probed requests of an engine: their programs, and who is edited with which argument.

One set of activations and edits is compiled at a time, for all probed requests that are
open. A request is prepared before it is queued: what it needs is compiled in the thread
that asks for it, while the engine goes on with what it has.
"""

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jllm.engine.admission import Job
from jllm.engine.builder import ProgramBuilder
from jllm.engine.capture import Captures, claim_captures
from jllm.engine.inputs import InputLayout
from jllm.engine.probed_steps import EditGroup, GroupInput, ProbeSet
from jllm.engine.probes import JobEdits, resolve
from jllm.engine.programs import ProgramOptions
from jllm.engine.results import InFlight
from jllm.scheduler.plan import StepPlan
from jllm.types import EngineRequest

MAX_SETS = 4
"""Sets whose programs are kept, so that two experiments in turn compile once."""

Key = tuple[str, int]


class ProbedPrograms:
    """The programs of one set: any step can run on the largest prefill.

    The largest decode is compiled beside it. The other sizes are not: a probed step
    computes more padding than a plain one.
    """

    def __init__(
        self, builder: ProgramBuilder, options: ProgramOptions, probes: ProbeSet
    ) -> None:
        """Compiles both; takes seconds."""
        self.probes = probes
        self._programs: dict[Key, tuple[InputLayout, Any]] = {}
        for kind, size in (
            ("prefill", options.sizes.tokens[-1]),
            ("decode", options.sizes.rows[-1]),
        ):
            program = builder.probed(kind, size, probes).program
            self._programs[kind, size] = options.layout(kind, size), program

    def get(self, *, is_decode: bool) -> tuple[InputLayout, Any]:
        """Layout and program for a step."""
        kind = "decode" if is_decode else "prefill"
        return next(found for key, found in self._programs.items() if key[0] == kind)


class EditTables:
    """For each group of edits the spans and arguments of all rows of the table.

    They are sent to the device again only when a row's have changed.
    """

    def __init__(self, groups: Sequence[EditGroup], num_rows: int) -> None:
        """Begins with rows that are not edited."""
        self._groups = list(groups)
        self._owners: list[JobEdits | None] = [None] * num_rows
        self._tables = [
            GroupInput(
                np.zeros((num_rows, len(group), 2), np.int32),
                tuple(
                    np.zeros((num_rows, *point.shape), point.dtype)
                    for point in group
                    if point.shape is not None
                ),
            )
            for group in groups
        ]
        self._placed: tuple[GroupInput, ...] | None = None

    def place(
        self,
        rows: Sequence[int],
        edits: Sequence[JobEdits | None],
        upload: Callable[[np.ndarray], jax.Array],
    ) -> tuple[GroupInput, ...]:
        """The tables on the device, right for these rows."""
        for row, own in zip(rows, edits, strict=True):
            if self._owners[row] is not own:
                self._set_row(row, own)
                self._placed = None
        if self._placed is None:
            # Copies, since a transfer may alias the buffer that is changed next time.
            copied = [
                (table.spans.copy(), [x.copy() for x in table.arguments])
                for table in self._tables
            ]
            self._placed = tuple(
                GroupInput(upload(spans), tuple(map(upload, arguments)))
                for spans, arguments in copied
            )
        return self._placed

    def _set_row(self, row: int, own: JobEdits | None) -> None:
        self._owners[row] = own
        for table in self._tables:
            table.spans[row] = 0
        if own is not None:
            table = self._tables[self._groups.index(own.group)]
            table.spans[row] = own.spans
            for values, argument in zip(table.arguments, own.arguments, strict=True):
                values[row] = argument


class Probing:
    """Knows the probed requests that are open, and runs the steps that have any.

    `prepare` and `release` may be called from any thread, the rest by the engine's.

    Args:
        make_builder: Makes what compiles the programs; called when it is needed first.
        options: Sizes.
        activations: Names that the model has.
        upload: Sends an array to the device.
    """

    def __init__(
        self,
        make_builder: Callable[[], ProgramBuilder],
        options: ProgramOptions,
        activations: Sequence[str],
        upload: Callable[[np.ndarray], jax.Array],
    ) -> None:
        """Compiles nothing."""
        self._make_builder, self._options = make_builder, options
        self._activations, self._upload = activations, upload
        self._lock = threading.Lock()
        self._open: dict[str, ProbeSet] = {}
        self._kept: dict[ProbeSet, ProbedPrograms] = {}
        self._current: ProbedPrograms | None = None
        self._tables: tuple[ProbeSet, EditTables] | None = None
        self.num_compiled = 0

    @property
    def num_open(self) -> int:
        """Probed requests that have been prepared and not released."""
        return len(self._open)

    def prepare(self, requests: Sequence[EngineRequest]) -> None:
        """Compiles what the requests need beside those that are open.

        Raises:
            InvalidRequestError: An activation is not known.
            ValueError: An edit changes a shape or a type.
        """
        wanted = {
            request.request_id: resolve(request.probes, self._activations).probes
            for request in requests
            if request.probes is not None and request.request_id not in self._open
        }
        if not wanted:
            return
        with self._lock:
            others = list(self._open.values())
            self._open |= wanted
            try:
                self._compile(others, list(wanted.values()))
            except BaseException:
                for request_id in wanted:
                    self.release(request_id)
                raise

    def release(self, request_id: str) -> None:
        """Forgets a request; unknown ids are ignored."""
        self._open.pop(request_id, None)

    def program(self, plan: StepPlan, jobs: Sequence[Job]) -> Any:
        """Layout and program of a step that is probed; None for any other.

        Args:
            plan: The step; with tokens of a prompt it is the largest prefill.
            jobs: The sequences of its rows.
        """
        if not self._open or all(job.probed is None for job in jobs):
            return None
        current = self._current  # may be replaced by another thread
        assert current is not None
        probes = current.probes
        if self._tables is None or self._tables[0] is not probes:
            self._tables = probes, EditTables(probes.groups, self._options.table_rows)
        edits = [job.probed.edits if job.probed else None for job in jobs]
        inputs = self._tables[1].place(plan.table_rows, edits, self._upload)
        layout, program = current.get(is_decode=plan.is_decode)
        return layout, partial(_call, program, inputs)

    def capture(self, flight: InFlight, captured: Mapping[str, jax.Array]) -> InFlight:
        """Claims what a launched step captures, and starts to copy it to the host.

        All tokens of the step are copied, of the activations that its rows ask for.
        """
        if not captured:
            return flight
        owners = [job.probed.captured if job.probed else None for job in flight.jobs]
        segments = claim_captures(flight.plan, owners)
        names = dict.fromkeys(name for own in segments for name in own.owner.names)
        arrays = {name: captured[name] for name in names}
        for array in arrays.values():
            array.copy_to_host_async()
        return dataclasses.replace(flight, captures=Captures(segments, arrays))

    def _compile(self, others: Sequence[ProbeSet], new: Sequence[ProbeSet]) -> None:
        """Makes programs for the new sets, and the others', the current ones."""
        wanted = _union([*others, *new], self._activations)
        current = self._current
        if others and current is not None and current.probes.covers(wanted):
            return
        programs = self._kept.pop(wanted, None)
        if programs is None:
            programs = ProbedPrograms(self._make_builder(), self._options, wanted)
            self.num_compiled += 1
        self._kept[wanted] = programs
        while len(self._kept) > MAX_SETS:
            del self._kept[next(iter(self._kept))]
        self._current = programs


def _call(
    program: Any, inputs: tuple[GroupInput, ...], weights: Any, state: Any, vector: Any
) -> Any:
    return program(weights, state, vector, inputs)


def _union(sets: Sequence[ProbeSet], activations: Sequence[str]) -> ProbeSet:
    names = {name for own in sets for name in own.capture}
    return ProbeSet(
        capture=tuple(name for name in activations if name in names),
        groups=tuple(dict.fromkeys(group for own in sets for group in own.groups)),
    )
