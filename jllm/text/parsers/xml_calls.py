"""Calls as nested tags: Qwen 3 Coder, Seed-OSS, MiniMax, DeepSeek V3.2 and V4."""

import dataclasses
import re

from jllm.text.parsers.call_object import copy_calls
from jllm.text.parsers.formats import (
    Task,
    attempt_section,
    copy_content,
    is_name,
)
from jllm.text.parsers.json_text import SPACE
from jllm.text.parsers.parameters import ObjectWriter, copy_text_value, types_of
from jllm.text.parsers.reader import Steps

_NAME = re.compile(r'[^<>"\n]*')
_STRING = frozenset({"string"})
_NOT_STRING = frozenset({"boolean", "integer", "number", "null", "array", "object"})


@dataclasses.dataclass(frozen=True, slots=True)
class XmlCalls:
    """`<tool_call><function=f><parameter=x>1</parameter></function></tool_call>`.

    JSON in the outer tags is read too.

    Attributes:
        opener: Before one or more calls.
        closer: Behind them.
        call: Before the name of a function.
        call_end: Behind a call.
        parameter: Before the name of a parameter.
        parameter_end: Behind its value.
        name_end: Behind a name.
        tells_strings: Whether behind a parameter's name stands whether it is a string.
    """

    opener: str
    closer: str
    call: str
    call_end: str
    parameter: str
    parameter_end: str
    name_end: str
    tells_strings: bool = False

    @property
    def openers(self) -> frozenset[str]:
        """The section's and, since models forget that one, the call's."""
        return frozenset({self.opener, self.call})

    @property
    def markers(self) -> frozenset[str]:
        """All tags, up to where names begin."""
        section = {self.opener, self.closer, self.call, self.call_end}
        return frozenset(section | {self.parameter, self.parameter_end})

    def parse(self, task: Task) -> Steps[None]:
        """Reads content and calls to the end of the text."""
        tags = self.call, self.closer
        while opener := (yield from copy_content(task, self.openers)):
            if opener == self.opener:
                opener += yield from task.reader.run(SPACE)
            if (yield from task.reader.peek()) in ("{", "["):
                yield from copy_calls(task, opener, self.closer)
            else:
                yield from attempt_section(task, opener, self._copy_call, tags)

    def _copy_call(self, task: Task) -> Steps[bool]:
        """Copies a call, whose opening tag has been read up to the name."""
        name = yield from self._read_name(task)
        if name is None:
            return False
        task.sink.begin_call(name)
        writer = ObjectWriter(task.sink.arguments)
        schema = task.schemas.get(name, {})
        ends = frozenset({self.parameter_end, self.parameter, self.call_end})
        yield from task.reader.skip(SPACE)
        tag = yield from task.reader.accept(self.parameter, self.call_end)
        while tag == self.parameter:
            key = yield from self._read_name(task, is_parameter=True)
            if key is None:
                return False
            types = yield from self._types(task, types_of(schema, key))
            if types is None:
                return False
            writer.key(key)
            tag = yield from copy_text_value(task.reader, writer.emit, types, ends)
            if tag == self.parameter_end:
                yield from task.reader.skip(SPACE)
                tag = yield from task.reader.accept(self.parameter, self.call_end)
        if not tag:
            return False
        writer.end()
        return True

    def _read_name(
        self, task: Task, *, is_parameter: bool = False
    ) -> Steps[str | None]:
        name = yield from task.reader.run(_NAME)
        end = '"' if is_parameter and self.tells_strings else self.name_end
        found = yield from task.reader.accept(end)
        return name.strip() if found and is_name(name.strip()) else None

    def _types(self, task: Task, types: frozenset[str]) -> Steps[frozenset[str] | None]:
        """The types of a parameter by its tag, else by its schema; None: bad tag."""
        if not self.tells_strings:
            return types
        options = {
            ' string="true">': _STRING,
            ' string="false">': _NOT_STRING,
            ">": types,
        }
        found = yield from task.reader.accept(*options)
        return options.get(found)
