"""The inputs of a job: lines of files, cut into ranges that are worked on as a whole.

A range knows where its bytes are and what they must hash to, so that a worker reads
only the ranges that it works on, and notices an input that has changed.
"""

import dataclasses
import hashlib
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jllm.batch.store import StorageError, is_local, open_url
from jllm.errors import ConfigError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
REQUEST_FIELDS = ("custom_id", "method", "url", "body")
PROMPT_FIELDS = ("custom_id", "prompt")


@dataclasses.dataclass(frozen=True, slots=True)
class InputFile:
    """A file of lines.

    Attributes:
        url: Path or URL.
        sha256: Hash of its bytes.
        size: Its bytes.
    """

    url: str
    sha256: str
    size: int

    @property
    def is_text(self) -> bool:
        """Whether its lines are prompts as they stand."""
        return self.url.endswith(".txt")

    @property
    def name(self) -> str:
        """Its last part."""
        return posixpath.basename(self.url)


@dataclasses.dataclass(frozen=True, slots=True)
class LineRange:
    """Lines of one file that follow each other.

    Attributes:
        file: Which of the inputs.
        first_line: Number of the first line; the first of a file is 1.
        start: Its first byte.
        end: The byte after its last.
        num_requests: Lines that are not blank.
        sha256: Hash of its bytes.
    """

    file: int
    first_line: int
    start: int
    end: int
    num_requests: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One line, and what it asks for.

    Attributes:
        number: Its number in its file, from 1.
        key: Names it for good: hash of its file's hash, its number and its custom_id.
        size: Its bytes.
        custom_id: What its author calls it.
        url: Path of the API that it asks; None for a plain prompt.
        body: What it sends there, or the prompt.
        problem: Why it asks for nothing; None for a good line.
    """

    number: int
    key: str
    size: int
    custom_id: str | None
    url: str | None = None
    body: Mapping[str, Any] | str | None = None
    problem: str | None = None


def find_inputs(patterns: Sequence[str]) -> list[str]:
    """Paths and URLs of the input files, those of a pattern in their order.

    Raises:
        ConfigError: There is no such file, or it cannot be read line by line.
    """
    found: list[str] = []
    for pattern in patterns:
        fs, path = open_url(pattern)
        is_pattern = any(sign in path for sign in "*?[")
        paths = sorted(fs.glob(path)) if is_pattern else [path]
        if not paths:
            raise ConfigError(f"input {pattern!r} matches no file")
        for one in paths:
            if not fs.isfile(one):
                raise ConfigError(f"input {pattern!r} is no file")
            if one.endswith(COMPRESSED):
                raise ConfigError(f"input {one!r} is compressed; give lines of text")
            found.append(one if is_local(fs) else fs.unstrip_protocol(one))
    if len(set(found)) < len(found):
        raise ConfigError("an input is given twice")
    return found


def index_inputs(
    urls: Sequence[str], range_lines: int
) -> tuple[list[InputFile], list[LineRange]]:
    """Reads all files once: their hashes, and their ranges.

    Args:
        urls: See `find_inputs`.
        range_lines: Lines of a range; the last of a file has fewer.

    Raises:
        StorageError: A file cannot be read.
    """
    files: list[InputFile] = []
    ranges: list[LineRange] = []
    for i, url in enumerate(urls):
        whole = hashlib.sha256()
        try:
            parts = list(_ranges(url, i, range_lines, whole))
        # Object stores raise whatever they like.
        except Exception as error:
            raise StorageError(f"{url}: {error}") from error
        size = parts[-1].end if parts else 0
        ranges += [part for part in parts if part.num_requests]
        files.append(InputFile(url, whole.hexdigest(), size))
    return files, ranges


def _ranges(url: str, file: int, range_lines: int, whole: Any) -> Iterator[LineRange]:
    first = number = 1
    start = end = num_requests = 0
    digest = hashlib.sha256()
    fs, path = open_url(url)
    with fs.open(path, "rb") as lines:
        for line in lines:
            number += 1
            end += len(line)
            num_requests += bool(line.strip())
            digest.update(line)
            whole.update(line)
            if number - first == range_lines:
                hashed = digest.hexdigest()
                yield LineRange(file, first, start, end, num_requests, hashed)
                first, start, num_requests = number, end, 0
                digest = hashlib.sha256()
    if end > start:
        yield LineRange(file, first, start, end, num_requests, digest.hexdigest())


def read_lines(file: InputFile, part: LineRange) -> list[Line]:
    """The lines of a range that are not blank.

    Raises:
        ConfigError: The file has changed since the job began.
        StorageError: It cannot be read.
    """
    fs, path = open_url(file.url)
    try:
        data: bytes = fs.cat_file(path, start=part.start, end=part.end)
    except Exception as error:
        raise StorageError(f"{file.url}: {error}") from error
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise ConfigError(f"input {file.url!r} has changed since the job began")
    return [
        parse_line(raw, file, part.first_line + i)
        for i, raw in enumerate(data.split(b"\n"))
        if raw.strip()
    ]


def parse_line(raw: bytes, file: InputFile, number: int) -> Line:
    """Reads one line; what is wrong with it is noted in it."""
    problem = custom_id = url = body = None
    try:
        text = raw.rstrip(b"\r\n").decode("utf-8")
        value = text if file.is_text else json.loads(text)
    except (ValueError, RecursionError):
        value, problem = None, "the line is no JSON in UTF-8"
        if file.is_text:
            problem = "the line is no text in UTF-8"
    if isinstance(value, dict):
        given = value.get("custom_id")
        custom_id = given if isinstance(given, str) else None
        problem, url, body = _read_object(value)
    elif problem is None and isinstance(value, str) and file.is_text:
        body = value
    elif problem is None:
        problem = "the line must be a JSON object"
    if custom_id is None and url is None and problem is None:
        custom_id = f"{file.name}:{number}"
    parts = json.dumps([file.sha256, number, custom_id])
    key = hashlib.sha256(parts.encode()).hexdigest()[:32]
    return Line(number, key, len(raw), custom_id, url, body, problem)


def _read_object(
    value: dict[str, Any],
) -> tuple[str | None, str | None, Mapping[str, Any] | str | None]:
    """What is wrong with a request or prompt; its URL and body if nothing is."""
    is_prompt = "prompt" in value and "body" not in value
    known = PROMPT_FIELDS if is_prompt else REQUEST_FIELDS
    problem: str | None = None
    unknown = sorted(set(value) - set(known))
    if unknown:
        problem = f"unknown field {unknown[0][:100]!r}"
    elif is_prompt and not isinstance(value["prompt"], str):
        problem = "prompt must be a string"
    elif "custom_id" in value and not isinstance(value["custom_id"], str):
        problem = "custom_id must be a string"
    elif not is_prompt:
        problem = _request_problem(value)
    if problem is not None:
        return problem, None, None
    if is_prompt:
        return None, None, value["prompt"]
    return None, value["url"], value["body"]


def _request_problem(value: Mapping[str, Any]) -> str | None:
    for name in REQUEST_FIELDS:
        if name not in value:
            return f"missing field {name}"
    if not value["custom_id"]:
        return "custom_id must not be empty"
    if value["method"] != "POST":
        return "method must be POST"
    if not isinstance(value["url"], str):
        return "url must be a string"
    if not isinstance(value["body"], dict):
        return "body must be a JSON object"
    return None
