"""What tool formats share: their interface, content between calls, ends of attempts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from jllm.text.parsers.json_text import SPACE
from jllm.text.parsers.reader import Reader, Steps
from jllm.text.parsers.sink import Sink


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What one output is parsed with.

    Attributes:
        reader: Its text.
        sink: Takes what is found.
        ignored: Special tokens that mean nothing to the format, left out of content.
        schemas: Parameters of each function by name, as JSON schemas.
    """

    reader: Reader
    sink: Sink
    ignored: frozenset[str]
    schemas: Mapping[str, Mapping[str, Any]]


class ToolFormat(Protocol):
    """A way in which models write calls."""

    @property
    def markers(self) -> frozenset[str]:
        """Strings that mean something to the format."""
        ...

    @property
    def openers(self) -> frozenset[str]:
        """Those markers of which one begins a call wherever it stands."""
        ...

    def parse(self, task: Task) -> Steps[None]:
        """Reads content and calls to the end of the text."""
        ...


CopyCall = Callable[[Task], Steps[bool]]
"""Reads one call; returns whether it was one."""


def copy_content(task: Task, openers: frozenset[str]) -> Steps[str]:
    """Copies content up to an opener.

    Returns:
        The opener, which has been read, or the empty string at the end of the text.
    """
    markers = openers | task.ignored
    while True:
        text, marker = yield from task.reader.piece(markers)
        task.sink.content(text)
        if marker in openers or not (text or marker):
            return marker


def attempt(task: Task, copy_call: CopyCall, before: str = "") -> Steps[bool]:
    """Reads one call; what was read of it is given back as content if it is none.

    Args:
        task: What is parsed.
        copy_call: Reads the call.
        before: What has been read of it already.
    """
    task.reader.record(before)
    is_call = yield from copy_call(task)
    text = task.reader.recorded()
    if is_call:
        task.sink.end_call()
    else:
        task.sink.fail(text)
    return is_call


def attempt_list(task: Task, copy_call: CopyCall, before: str) -> Steps[None]:
    """Reads calls separated by commas up to a closing bracket."""
    while (yield from attempt(task, copy_call, before)):
        yield from task.reader.skip(SPACE)
        before = yield from task.reader.accept(",")
        before += yield from task.reader.run(SPACE)
        if (yield from task.reader.accept("]")) or not before:
            return


def attempt_section(
    task: Task, opener: str, copy_call: CopyCall, tags: tuple[str, str]
) -> Steps[None]:
    """Reads a section of calls of which each begins with a tag.

    Args:
        task: What is parsed.
        opener: Of the section, or the tag of the first call where it was left out;
            it has been read.
        copy_call: Reads a call behind its tag.
        tags: Before each call, and behind the section.
    """
    call, closer = tags
    before = opener
    if opener != call:
        before += yield from task.reader.run(SPACE)
        found = yield from task.reader.accept(call)
        if not found:
            task.sink.fail(before)
            return
        before += found
    while (yield from attempt(task, copy_call, before)):
        yield from task.reader.skip(SPACE)
        if not (yield from task.reader.accept(call)):
            yield from task.reader.accept(closer)
            return
        before = call


def is_name(name: str | None) -> bool:
    """Whether this can be the name of a function."""
    return bool(name) and str(name).isprintable()
