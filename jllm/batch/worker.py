"""One worker of a job: takes ranges, has their lines answered, writes, and merges."""

import asyncio
import collections
import contextlib
import dataclasses
import enum
import json
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jllm.batch.inputs import Line, read_lines
from jllm.batch.job import Job, JobConfig, range_name
from jllm.batch.leases import (
    BEATS_PER_LEASE,
    CLAIMS,
    JOB_CLAIM,
    MERGE_CLAIM,
    POLLS_PER_LEASE,
    WORKERS,
    Claims,
    LeaseLostError,
    Peers,
    Presence,
    Ranges,
    wait_for_turn,
)
from jllm.batch.progress import Progress
from jllm.batch.records import (
    DONE,
    PARTS,
    Answer,
    DamagedRangeError,
    Journal,
    Record,
    merge,
    read_records,
)
from jllm.batch.store import StorageError, Store

logger = logging.getLogger("jllm")

Answerer = Callable[[Line], Awaitable[Answer]]
"""Answers a line; what it raises ends the worker, and the line is done again later."""


class Outcome(enum.Enum):
    """How a worker has ended."""

    FINISHED = "finished"
    STOPPED = "stopped"


@dataclasses.dataclass(slots=True)
class _Taken:
    """A range that this worker has.

    Attributes:
        index: Which.
        num_open: Its lines without a record on the disk.
        tasks: Its lines that are being answered.
    """

    index: int
    num_open: int
    tasks: set[asyncio.Task[None]] = dataclasses.field(default_factory=set)


class Worker:
    """Works on a job until it is done, or until it is told to stop.

    Use it as a context manager: inside, others see that it lives. It may be entered
    before the model is loaded, so that a second worker by mistake is refused at once.
    """

    def __init__(
        self, store: Store, job: Job, config: JobConfig, progress: Progress
    ) -> None:
        """Touches nothing yet.

        Args:
            store: The job's folder.
            job: The job.
            config: How to go about it.
            progress: Counts the lines.
        """
        self._store = store
        self._job = job
        self._config = config
        self._progress = progress
        self._presence = Presence(
            store,
            config.worker,
            is_shared=config.is_shared,
            lease_seconds=config.lease_seconds,
        )
        worker = self._presence.worker
        self._peers = Peers(store, config.lease_seconds)
        self._claims = Claims(store, worker, self._peers)
        self._ranges = Ranges(job, self._claims, worker)
        self._journal = Journal(store, worker)
        self._poll = config.lease_seconds / POLLS_PER_LEASE
        self._taken: dict[int, _Taken] = {}
        self._records: dict[int, list[Record]] = collections.defaultdict(list)
        self._known: set[int] = set()
        self._merges = False
        self._failure: BaseException | None = None
        self._failed = asyncio.Event()
        self._slots = asyncio.Semaphore(config.max_in_flight)
        # One thread for files: what is written to them stays in order.
        self._files = ThreadPoolExecutor(1, thread_name_prefix="jllm-batch-files")

    def __enter__(self) -> "Worker":
        self._presence.__enter__()
        try:
            wait_for_turn(
                self._claims,
                self._peers,
                self._presence.worker,
                is_shared=self._config.is_shared,
                lease_seconds=self._config.lease_seconds,
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._files.shutdown()
        self._presence.__exit__()
        with contextlib.suppress(StorageError):
            if self._is_finished():
                clear(self._store)

    async def run(self, answer: Answerer, stop: asyncio.Event) -> Outcome:
        """Works.

        Args:
            answer: Answers lines; called for many at once.
            stop: Once set, no line is begun, and those that run get a short time.

        Raises:
            StorageError: A file could not be written; what was written stays.
            LeaseLostError: This worker was taken for lost.
        """
        self._progress.begin()
        working = asyncio.create_task(self._work(answer))
        flushing = asyncio.create_task(self._flush_often())
        stopping = asyncio.create_task(stop.wait())
        failing = asyncio.create_task(self._failed.wait())
        everything: set[asyncio.Task[Any]] = {working, flushing, stopping, failing}
        try:
            await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._wind_up(everything, waits=stopping.done())
        if self._failure is not None:
            raise self._failure
        for task in (working, flushing):
            if not task.cancelled():
                task.result()
        return Outcome.STOPPED if working.cancelled() else Outcome.FINISHED

    async def _wind_up(
        self, everything: set[asyncio.Task[Any]], *, waits: bool
    ) -> None:
        """Ends all tasks and writes what is done."""
        for task in everything:
            task.cancel()
        await asyncio.wait(everything)
        lines = [task for taken in self._taken.values() for task in taken.tasks]
        if lines and waits:
            await asyncio.wait(lines, timeout=self._config.grace_seconds)
        for task in lines:
            task.cancel()
        if lines:
            await asyncio.wait(lines)
        if not isinstance(self._failure, StorageError):
            await self._flush()

    async def _work(self, answer: Answerer) -> None:
        """Answers all lines that can be had; returns when the job is done."""
        while not await self._in_files(self._is_finished):
            index = await self._in_files(self._ranges.take)
            self._note_finished()
            if index is not None:
                await self._begin(index, answer)
            elif self._ranges.is_done:
                await self._in_files(self._merge)
            else:
                await self._wait()

    def _is_finished(self) -> bool:
        return self._store.exists(DONE)

    async def _wait(self) -> None:
        """Waits for lines of this worker, or for other workers."""
        lines = [task for taken in self._taken.values() for task in taken.tasks]
        if not lines:
            if not self._taken:
                await asyncio.sleep(self._poll)
            await self._flush()
            return
        await asyncio.wait(lines, timeout=self._poll)
        if all(task.done() for task in lines):
            await self._flush()

    async def _begin(self, index: int, answer: Answerer) -> None:
        """Starts the lines of a range, the longest first; waits for room for each.

        Lines of like length share steps well, and the last ones to end are short.
        """
        part = self._job.ranges[index]
        lines = await self._in_files(self._open_lines, index)
        self._known.add(index)
        self._progress.skip(part.num_requests - len(lines))
        taken = self._taken[index] = _Taken(index, len(lines))
        for line in lines:
            await self._slots.acquire()
            if index not in self._taken:
                self._slots.release()
                return
            task = asyncio.create_task(self._answer(taken, line, answer))
            taken.tasks.add(task)
            task.add_done_callback(taken.tasks.discard)

    def _open_lines(self, index: int) -> list[Line]:
        """The lines of a range that have no record yet."""
        part = self._job.ranges[index]
        lines = read_lines(self._job.files[part.file], part)
        records = read_records(self._store, index)
        lines = [line for line in lines if line.number not in records]
        return sorted(lines, key=lambda line: -line.size)

    async def _answer(self, taken: _Taken, line: Line, answer: Answerer) -> None:
        try:
            found = await answer(line)
            self._records[taken.index].append(Record(line.number, line.key, found))
            self._progress.update(found)
        # Whatever it is, it belongs to whoever runs the worker.
        except Exception as error:  # noqa: BLE001
            self._fail(error)
        finally:
            self._slots.release()

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
            self._failed.set()

    async def _flush_often(self) -> None:
        """Writes records every now and then, and looks after this worker's claims."""
        lease = self._config.lease_seconds / BEATS_PER_LEASE
        checked = time.monotonic()
        while True:
            await asyncio.sleep(min(self._config.flush_seconds, lease))
            await self._flush()
            if time.monotonic() - checked >= lease:
                checked = time.monotonic()
                await self._check_claims()

    async def _flush(self) -> None:
        """Writes the records there are; ranges without open lines are done."""
        records = dict(self._records)
        self._records.clear()
        try:
            # Written even if whoever flushes is cancelled meanwhile.
            await asyncio.shield(self._in_files(self._journal.write, records))
            for index, found in records.items():
                if index in self._taken:
                    self._taken[index].num_open -= len(found)
            for index, taken in list(self._taken.items()):
                # Another flush may have run while this one has waited.
                if not taken.num_open and self._taken.pop(index, None):
                    await self._in_files(self._claims.finish, range_name(index))
        except StorageError as error:
            self._fail(error)

    async def _check_claims(self) -> None:
        """Leaves alone what others have taken over."""
        mine = {range_name(index): index for index in self._taken}
        names = list(mine) if self._config.is_shared else [JOB_CLAIM, *mine]
        for name in await self._in_files(self._claims.lost, names):
            if name == JOB_CLAIM:
                self._fail(LeaseLostError("another worker has taken over this job"))
                return
            logger.warning("another worker has taken over lines of this one")
            taken = self._taken.pop(mine[name], None)
            if taken is None:  # it was done meanwhile
                continue
            self._records.pop(taken.index, None)
            for task in taken.tasks:
                task.cancel()

    def _note_finished(self) -> None:
        """Counts the lines of ranges that others have done."""
        for index in self._ranges.finished - self._known:
            self._known.add(index)
            self._progress.skip(self._job.ranges[index].num_requests)

    def _merge(self) -> None:
        """Writes the output, or waits for the worker that does."""
        number = self._claims.latest().get(MERGE_CLAIM)
        self._merges = self._merges or self._claims.take(MERGE_CLAIM, number)
        # A worker that comes late finds an empty folder, and the job done.
        if self._is_finished():
            return
        if not self._merges:
            time.sleep(self._poll)
            return
        try:
            merge(self._store, self._job)
        except DamagedRangeError as error:
            logger.warning("%s; the others are done again", error)
            self._claims.reopen(range_name(error.index))
            self._ranges.finished.discard(error.index)

    async def _in_files(self, function: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._files, function, *arguments)


def clear(store: Store) -> None:
    """Removes what a job needs no more once its output is written."""
    for folder in (PARTS, CLAIMS, WORKERS):
        with contextlib.suppress(StorageError):
            store.remove_folder(folder)


def summary(store: Store) -> dict[str, int] | None:
    """Counts of a job that is done: lines, errors and tokens; None if it is not."""
    raw = store.read(DONE)
    return None if raw is None else json.loads(raw)
