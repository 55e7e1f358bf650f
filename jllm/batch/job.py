"""What a job is: its inputs and what is asked of them, fixed when it begins."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jllm.batch.inputs import InputFile, LineRange, find_inputs, index_inputs
from jllm.batch.store import Store
from jllm.errors import ConfigError

MANIFEST = "job.json"
OWN_NAMES = ("parts", "claims", "workers", "output.jsonl", "errors.jsonl")
"""What a job makes in its folder, and removes or replaces: never anybody else's."""
VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """How a worker goes about a job.

    Attributes:
        worker: Name of the worker in messages.
        is_shared: Whether others may work on the job at the same time.
        range_lines: Lines of a range: what is taken, and lost, at once.
        max_in_flight: Lines that are worked on at once.
        lease_seconds: Without a sign of life for so long, a worker is taken for lost.
        flush_seconds: Answers are written after so long.
        grace_seconds: How long lines that are worked on get to end after a stop.
    """

    worker: str
    is_shared: bool
    range_lines: int
    max_in_flight: int
    lease_seconds: float
    flush_seconds: float
    grace_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A job, as `job.json` keeps it.

    Attributes:
        files: The inputs.
        ranges: Their lines in pieces.
        settings: What decides the answers besides the inputs.
    """

    files: tuple[InputFile, ...]
    ranges: tuple[LineRange, ...]
    settings: Mapping[str, Any]

    @property
    def num_requests(self) -> int:
        """Lines to be answered."""
        return sum(part.num_requests for part in self.ranges)


def range_name(index: int) -> str:
    """Name of a range in the job's folder."""
    return f"{index:08d}"


def open_job(
    store: Store, inputs: Sequence[str], settings: Mapping[str, Any], range_lines: int
) -> Job:
    """Begins a job, or finds the one that was begun.

    Args:
        store: The job's folder.
        inputs: Paths, patterns or URLs of the inputs.
        settings: What decides the answers besides the inputs; JSON.
        range_lines: Lines of a range, where the job begins.

    Raises:
        ConfigError: An input is missing, another job was begun in this folder, or it
            holds what a job would overwrite.
    """
    urls = find_inputs(inputs)
    # Looked for first: another worker makes them after the manifest.
    found = [name for name in store.names("") if name in OWN_NAMES]
    raw = store.read(MANIFEST)
    if raw is None:
        if found:
            raise ConfigError(
                f"{store.url} holds {', '.join(found)} of something else; give another "
                "folder"
            )
        files, ranges = index_inputs(urls, range_lines)
        if not ranges:
            raise ConfigError("the inputs have no lines")
        job = Job(tuple(files), tuple(ranges), settings)
        if store.create(MANIFEST, _to_json(job)):
            return job
        raw = store.read(MANIFEST) or b""
    job = _from_json(raw, store)
    _check_same(job, urls, settings, store)
    return job


def _to_json(job: Job) -> bytes:
    fields = {
        "version": VERSION,
        "settings": job.settings,
        "files": [dataclasses.asdict(file) for file in job.files],
        "ranges": [dataclasses.astuple(part) for part in job.ranges],
    }
    return json.dumps(fields, sort_keys=True).encode()


def _from_json(raw: bytes, store: Store) -> Job:
    try:
        fields = json.loads(raw)
        if fields["version"] != VERSION:
            raise ConfigError(f"{store.url} holds a job of another version")
        files = tuple(InputFile(**file) for file in fields["files"])
        ranges = tuple(LineRange(*part) for part in fields["ranges"])
        return Job(files, ranges, fields["settings"])
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{store.path(MANIFEST)} is damaged") from error


def _check_same(
    job: Job, urls: Sequence[str], settings: Mapping[str, Any], store: Store
) -> None:
    begun = [file.url for file in job.files]
    if begun != list(urls):
        raise ConfigError(
            f"the job in {store.url} was begun with the inputs {', '.join(begun)}; "
            "give those, or another output"
        )
    for name in sorted(set(settings) | set(job.settings)):
        old, new = job.settings.get(name), settings.get(name)
        if old != new:
            raise ConfigError(
                f"the job in {store.url} was begun with {name}={old!r}, not {new!r}; "
                "give that, or another output"
            )
