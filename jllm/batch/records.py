"""Answers on their way to the output: journals of complete lines, then one file.

Every worker writes journals of its own, one per range; nobody else ever writes them. A
line is done when its record stands in one of them complete, with its end of line. What
a crash has torn has no end of line, or is no JSON, and counts as never written.
"""

import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from jllm.batch.job import Job, range_name
from jllm.batch.store import StorageError, Store

PARTS = "parts"
OUTPUT = "output.jsonl"
ERRORS = "errors.jsonl"
DONE = "done.json"

# Made once: `json.dumps` would make one for every record.
_encoder = json.JSONEncoder(separators=(",", ":"))


class DamagedRangeError(StorageError):
    """Lines of a range have no record, although all of them were once written."""

    def __init__(self, index: int, message: str) -> None:
        """Names the range."""
        super().__init__(message)
        self.index = index


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What became of one line.

    Attributes:
        result: The object to be written.
        is_error: Whether it belongs into the file of errors.
        num_prompt_tokens: Tokens read.
        num_output_tokens: Tokens generated.
    """

    result: Mapping[str, Any]
    is_error: bool = False
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A line of a journal.

    Attributes:
        line: Number of the line that is answered, in its file.
        key: The line's key.
        answer: The answer.
    """

    line: int
    key: str
    answer: Answer

    def to_bytes(self) -> bytes:
        """The record as a line."""
        fields = {
            "line": self.line,
            "key": self.key,
            "is_error": self.answer.is_error,
            "num_prompt_tokens": self.answer.num_prompt_tokens,
            "num_output_tokens": self.answer.num_output_tokens,
            "result": self.answer.result,
        }
        return _encoder.encode(fields).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> "Record | None":
        """Reads a line back; None if it is damaged."""
        try:
            fields = json.loads(data)
            answer = Answer(
                fields["result"],
                fields["is_error"],
                fields["num_prompt_tokens"],
                fields["num_output_tokens"],
            )
            return cls(fields["line"], fields["key"], answer)
        except (ValueError, TypeError, KeyError):
            return None


class Journal:
    """Collects records and writes them; used by one thread at a time."""

    def __init__(self, store: Store, worker: str) -> None:
        """Writes nothing yet.

        Args:
            store: The job's folder.
            worker: Name that no other worker has, nor ever had.
        """
        self._store = store
        self._worker = worker
        self._num_parts = 0
        self._is_broken = False

    def write(self, found: Mapping[int, list[Record]]) -> None:
        """Writes records of ranges; on return they outlast a crash.

        Raises:
            StorageError: They could not be written. The journal must not be used again.
        """
        if self._is_broken:
            raise StorageError(f"{self._store.url}: an earlier write has failed")
        # What follows a torn line would be torn with it.
        self._is_broken = True
        for index, records in found.items():
            data = b"".join(record.to_bytes() for record in records)
            folder = f"{PARTS}/{range_name(index)}"
            if self._store.is_local:
                self._store.append(f"{folder}/{self._worker}.jsonl", data)
                continue
            name = f"{folder}/{self._worker}.{self._num_parts:06d}.jsonl"
            self._num_parts += 1
            if not self._store.create(name, data):
                raise StorageError(f"{name} is there already")
        self._is_broken = False


def read_records(store: Store, index: int) -> dict[int, Record]:
    """The records of a range, by line; of several for one line the first counts.

    The order is that of the journals' names: the same for everyone who reads them.
    """
    found: dict[int, Record] = {}
    folder = f"{PARTS}/{range_name(index)}"
    for name in store.names(folder):
        data = store.read(f"{folder}/{name}") or b""
        *complete, _ = data.split(b"\n")
        for line in complete:
            record = Record.from_bytes(line)
            if record is not None:
                found.setdefault(record.line, record)
    return found


def merge(store: Store, job: Job) -> dict[str, int]:
    """Writes the output and the errors, in the order of the inputs' lines.

    Returns:
        Counts: lines, errors, and tokens.

    Raises:
        DamagedRangeError: Lines have no record.
        StorageError: A file could not be written.
    """
    counts: collections.Counter[str] = collections.Counter()
    with store.writing(OUTPUT) as output, store.writing(ERRORS) as errors:
        for answer in _answers(store, job):
            data = _encoder.encode(answer.result).encode() + b"\n"
            (errors if answer.is_error else output).write(data)
            counts["lines"] += 1
            counts["errors"] += answer.is_error
            counts["prompt_tokens"] += answer.num_prompt_tokens
            counts["output_tokens"] += answer.num_output_tokens
    found = dict(counts)
    store.replace(DONE, json.dumps(found).encode())
    return found


def _answers(store: Store, job: Job) -> Iterator[Answer]:
    for index, part in enumerate(job.ranges):
        records = read_records(store, index)
        if len(records) != part.num_requests:
            raise DamagedRangeError(
                index,
                f"{len(records)} of the {part.num_requests} lines from "
                f"{part.first_line} of {job.files[part.file].url} have a record",
            )
        for number in sorted(records):
            yield records[number].answer
