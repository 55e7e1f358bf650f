"""Calls written as Python: Llama 3.2 and 4, and others; nothing is evaluated."""

import dataclasses
import re

from jllm.text.parsers.call_object import copy_full_object
from jllm.text.parsers.formats import Task, attempt_list, copy_content, is_name
from jllm.text.parsers.json_text import SPACE
from jllm.text.parsers.parameters import ObjectWriter
from jllm.text.parsers.python_text import copy_literal
from jllm.text.parsers.reader import Steps

_BLANK = re.compile(r"\s*")
_NAME = re.compile(r"[\w.]*")


@dataclasses.dataclass(frozen=True, slots=True)
class PythonicCalls:
    """`[f(x=1, y="a"), g()]` at the start of the output or behind a tag.

    A list of call objects in JSON is read too.

    Attributes:
        opener: Tag before the list, which may be left out at the start.
        closer: Tag behind it.
    """

    opener: str = "<|python_tag|>"
    closer: str | None = None

    @property
    def openers(self) -> frozenset[str]:
        """The tag before the list."""
        return frozenset({self.opener})

    @property
    def markers(self) -> frozenset[str]:
        """Both tags."""
        return frozenset({self.opener, self.closer or self.opener})

    def parse(self, task: Task) -> Steps[None]:
        """Reads content and calls to the end of the text."""
        reader = task.reader
        before = yield from reader.run(_BLANK)
        before += yield from reader.accept(self.opener)
        while True:
            before += yield from reader.run(SPACE)
            if found := (yield from reader.accept("[")):
                before += found + (yield from reader.run(SPACE))
                is_json = (yield from reader.peek()) == "{"
                copy_call = copy_full_object if is_json else _copy_call
                yield from attempt_list(task, copy_call, before)
            else:
                task.sink.content(before)
            if self.closer and task.sink.after_call:
                yield from reader.skip(SPACE)
                yield from reader.accept(self.closer)
            before = yield from copy_content(task, self.openers)
            if not before:
                return


def _copy_call(task: Task) -> Steps[bool]:
    reader = task.reader
    yield from reader.skip(SPACE)
    name = yield from reader.run(_NAME)
    yield from reader.skip(SPACE)
    if not is_name(name) or name[0].isdigit() or not (yield from reader.accept("(")):
        return False
    yield from reader.skip(SPACE)
    writer = ObjectWriter(task.sink.arguments)
    began = False
    while not (yield from reader.accept(")")):
        key = yield from reader.run(_NAME)
        yield from reader.skip(SPACE)
        if not (is_name(key) and (yield from reader.accept("="))):
            return False
        if not began:
            task.sink.begin_call(name)
            began = True
        writer.key(key)
        if not (yield from copy_literal(reader, writer.emit)):
            return False
        character = yield from reader.skip(SPACE)
        if character == ",":
            reader.take(1)
            yield from reader.skip(SPACE)
        elif character != ")":
            return False
    if not began:
        task.sink.begin_call(name)
    writer.end()
    return True
