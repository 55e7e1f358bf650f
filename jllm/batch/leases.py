"""Who works on what: signs of life, and claims that outlive nobody for long.

Every worker process has a name that was never used before and a file with a count that
grows while it lives. A claim is a file that is created once; it holds the name of its
owner, and a number. Whoever finds the owner lost creates the claim with the next
number, which one worker alone succeeds in, on disks and in object stores alike. No
clocks are compared: a worker is lost when its count has stood still for as long as a
lease lasts, on the clock of the one who watches. On one machine a lock on a file, which
the system takes back when its process ends, tells a dead worker at once.

Claims save work; that each line is answered once does not hang on them. A worker that
was only slow, and answers lines that another one has taken over, adds records that the
merge leaves out.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jllm.batch.job import Job, range_name
from jllm.batch.store import StorageError, Store
from jllm.errors import JllmError

logger = logging.getLogger("jllm")

WORKERS = "workers"
CLAIMS = "claims"
JOB_CLAIM = "job"
MERGE_CLAIM = "merge"
FINISHED = "done"
"""In place of a claim's number: the work is done."""
BEATS_PER_LEASE = 4
POLLS_PER_LEASE = 10
BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")


class JobBusyError(JllmError, RuntimeError):
    """Another worker is at the job, and not one that shares it."""


class LeaseLostError(JllmError, RuntimeError):
    """Others have taken this worker for lost, and its work."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sign:
    """A worker's sign of life.

    Attributes:
        host: Name of its machine.
        pid: Its process.
        machine: Names the running system, for locks hold within one only.
        is_shared: Whether it shares the job.
        beat: Grows while it lives.
        has_ended: Whether it has said goodbye.
    """

    host: str
    pid: int
    machine: str
    is_shared: bool
    beat: int
    has_ended: bool


def _machine() -> str:
    with contextlib.suppress(OSError):
        return BOOT_ID.read_text().strip()
    return socket.gethostname()


def _sign_file(worker: str) -> str:
    return f"{WORKERS}/{worker}.json"


def _lock_path(store: Store, worker: str) -> pathlib.Path:
    return pathlib.Path(store.path(f"{WORKERS}/{worker}.lock"))


def _read_sign(store: Store, worker: str) -> Sign | None:
    raw = store.read(_sign_file(worker))
    try:
        return None if raw is None else Sign(**json.loads(raw))
    except (ValueError, TypeError):
        return None


def declare_dead(store: Store, name: str) -> None:
    """Ends the leases of all workers of a name, which the caller knows to be dead."""
    for file in store.names(WORKERS):
        worker, _, kind = file.rpartition(".")
        sign = _read_sign(store, worker)
        if kind == "json" and worker.rpartition("-")[0] == name and sign is not None:
            ended = dataclasses.replace(sign, has_ended=True)
            data = json.dumps(dataclasses.asdict(ended)).encode()
            store.replace(_sign_file(worker), data)


class Presence:
    """This worker, as long as it lives; its sign is renewed by a thread."""

    def __init__(
        self, store: Store, name: str, *, is_shared: bool, lease_seconds: float
    ) -> None:
        """Gives no sign yet.

        Args:
            store: The job's folder.
            name: Name in messages; the worker's own is longer, and new every time.
            is_shared: Whether it shares the job.
            lease_seconds: See `JobConfig`.
        """
        self.worker = f"{name}-{uuid.uuid4().hex[:12]}"
        self._store = store
        self._interval = lease_seconds / BEATS_PER_LEASE
        self._sign = Sign(
            socket.gethostname(), os.getpid(), _machine(), is_shared, 0, False
        )
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="jllm-batch-lease", daemon=True
        )
        self._lock: int | None = None

    def __enter__(self) -> "Presence":
        if self._store.is_local:
            with self._store.errors(WORKERS):
                path = _lock_path(self._store, self.worker)
                path.parent.mkdir(parents=True, exist_ok=True)
                # Held before anybody can know of it, and given back by the system.
                self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._write(self._sign)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(StorageError):
            self._write(dataclasses.replace(self._sign, has_ended=True))
        if self._lock is not None:
            os.close(self._lock)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            self._sign = dataclasses.replace(self._sign, beat=self._sign.beat + 1)
            try:
                self._write(self._sign)
            except StorageError as error:
                logger.warning("no sign of life could be given: %s", error)

    def _write(self, sign: Sign) -> None:
        data = json.dumps(dataclasses.asdict(sign)).encode()
        self._store.replace(_sign_file(self.worker), data)


class Peers:
    """What this worker knows of the others, by watching them."""

    def __init__(self, store: Store, lease_seconds: float) -> None:
        """Has watched nobody yet."""
        self._store = store
        self._lease_seconds = lease_seconds
        self._seen: dict[str, tuple[int | None, float]] = {}
        self._moved: set[str] = set()
        self._machine = _machine()

    def sign(self, worker: str) -> Sign | None:
        """The sign of life of a worker, if it has one."""
        return _read_sign(self._store, worker)

    def names(self) -> list[str]:
        """All workers that have given a sign."""
        files = self._store.names(WORKERS)
        return [file.removesuffix(".json") for file in files if file.endswith(".json")]

    def state(self, worker: str) -> Literal["lost", "alive", "unknown"]:
        """What has become of a worker; who is unknown has to be watched for longer."""
        sign = self.sign(worker)
        if sign is not None and sign.has_ended:
            return "lost"
        is_near = sign is not None and sign.machine == self._machine
        if is_near and self._store.is_local and not self._is_locked(worker):
            return "lost"
        beat = None if sign is None else sign.beat
        now = time.monotonic()
        last, since = self._seen.setdefault(worker, (beat, now))
        if last != beat:
            self._seen[worker] = (beat, now)
            self._moved.add(worker)
        elif now - since > self._lease_seconds:
            return "lost"
        is_held = is_near and self._store.is_local
        return "alive" if is_held or worker in self._moved else "unknown"

    def _is_locked(self, worker: str) -> bool:
        try:
            descriptor = os.open(_lock_path(self._store, worker), os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False


class Claims:
    """The claims of one worker."""

    def __init__(self, store: Store, worker: str, peers: Peers) -> None:
        """Has none yet."""
        self._store = store
        self._worker = worker
        self._peers = peers

    def latest(self) -> dict[str, str]:
        """The last number of every claim, or that its work is done."""
        found: dict[str, str] = {}
        for name in self._store.names(CLAIMS):
            # In order: later numbers follow earlier ones, and the end all of them.
            what, _, number = name.rpartition(".")
            found[what] = number
        return found

    def owner(self, what: str, number: str) -> str:
        """Who has a claim."""
        return (self._store.read(f"{CLAIMS}/{what}.{number}") or b"").decode()

    def take(self, what: str, number: str | None) -> bool:
        """Takes a claim that is free or whose owner is lost.

        Args:
            what: The work.
            number: The last number of the claim, as `latest` has told; None if free.

        Returns:
            Whether it is this worker's now, and was not before.
        """
        if number == FINISHED:
            return False
        following = 0
        if number is not None:
            owner = self.owner(what, number)
            if owner == self._worker or self._peers.state(owner) != "lost":
                return False
            following = int(number) + 1
            logger.info("takes over from %s, which is lost", owner or "nobody")
        name = f"{CLAIMS}/{what}.{following:06d}"
        return self._store.create(name, self._worker.encode())

    def finish(self, what: str) -> None:
        """Notes that the work is done; may be noted twice."""
        self._store.create(f"{CLAIMS}/{what}.{FINISHED}", self._worker.encode())

    def reopen(self, what: str) -> None:
        """Forgets that work was done, and who has done it."""
        for name in self._store.names(CLAIMS):
            if name.rpartition(".")[0] == what:
                self._store.remove(f"{CLAIMS}/{name}")

    def lost(self, mine: Sequence[str]) -> list[str]:
        """Which of this worker's claims others have taken."""
        latest = self.latest()
        return [
            what
            for what in mine
            if latest.get(what) != FINISHED
            and self.owner(what, latest.get(what, "")) != self._worker
        ]


class Ranges:
    """Gives ranges of a job to this worker, one after the other."""

    def __init__(self, job: Job, claims: Claims, worker: str) -> None:
        """Begins at a place of its own, so that workers do not meet at every claim."""
        self._job = job
        self._claims = claims
        count = len(job.ranges)
        first = int(worker[-6:], 16) % count
        self._order = [(first + i) % count for i in range(count)]
        self.finished: set[int] = set()
        """Ranges that are done, as far as is known."""

    def take(self) -> int | None:
        """Claims a range; None if there is none to be had now."""
        latest = self._claims.latest()
        states = {i: latest.get(range_name(i)) for i in self._order}
        self.finished.update(i for i, state in states.items() if state == FINISHED)
        free = [i for i in self._order if states[i] is None]
        held = [i for i in self._order if states[i] not in (None, FINISHED)]
        for index in free + held:
            if self._claims.take(range_name(index), states[index]):
                return index
        return None

    @property
    def is_done(self) -> bool:
        """Whether all ranges are done, as far as is known."""
        return len(self.finished) == len(self._job.ranges)


def wait_for_turn(
    claims: Claims,
    peers: Peers,
    worker: str,
    *,
    is_shared: bool,
    lease_seconds: float,
    sleep: Callable[[float], Any] = time.sleep,
) -> None:
    """Returns when this worker may begin; a worker that was lost is waited out.

    Both kinds of workers first give a sign, or claim the job, and then look for the
    other kind: of two that begin at the same time one sees the other.

    Raises:
        JobBusyError: Another worker lives that does not share the job, or with whom
            this one would not share it.
    """
    has_job = is_shared
    while True:
        number = claims.latest().get(JOB_CLAIM)
        has_job = has_job or claims.take(JOB_CLAIM, number)
        if has_job and is_shared:
            holder = [] if number is None else [claims.owner(JOB_CLAIM, number)]
        elif has_job:
            signs = {name: peers.sign(name) for name in peers.names()}
            holder = [name for name, sign in signs.items() if sign and sign.is_shared]
        else:
            number = claims.latest().get(JOB_CLAIM, "")
            holder = [claims.owner(JOB_CLAIM, number)]
        states = {name: peers.state(name) for name in holder if name != worker}
        for name, state in states.items():
            if state == "alive":
                raise JobBusyError(_busy(name, peers.sign(name)))
        if has_job and all(state == "lost" for state in states.values()):
            return
        sleep(lease_seconds / POLLS_PER_LEASE)


def _busy(worker: str, sign: Sign | None) -> str:
    where = f" (process {sign.pid} on {sign.host})" if sign else ""
    return (
        f"worker {worker}{where} is at this job; start every worker with --shared "
        "for several to work on it"
    )
