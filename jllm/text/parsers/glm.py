"""Calls of GLM 4.5 to 4.7: a name and tagged pairs of key and value."""

import dataclasses
import re

from jllm.text.parsers.call_object import copy_calls
from jllm.text.parsers.formats import Task, attempt, copy_content, is_name
from jllm.text.parsers.json_text import SPACE
from jllm.text.parsers.parameters import ObjectWriter, copy_text_value, types_of
from jllm.text.parsers.reader import Steps

_OPENER = "<tool_call>"
_CLOSER = "</tool_call>"
_KEY, _KEY_END = "<arg_key>", "</arg_key>"
_VALUE, _VALUE_END = "<arg_value>", "</arg_value>"
_NAME = re.compile(r"[^<\n]*")


@dataclasses.dataclass(frozen=True, slots=True)
class GlmCalls:
    """`<tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>`.

    Line breaks between the tags, as GLM 4.5 and 4.6 write them, do not matter. JSON in
    the outer tags is read too.
    """

    @property
    def openers(self) -> frozenset[str]:
        """The tag before a call."""
        return frozenset({_OPENER})

    @property
    def markers(self) -> frozenset[str]:
        """All tags."""
        return frozenset(
            {_OPENER, _CLOSER, _KEY, _KEY_END, _VALUE, _VALUE_END},
        )

    def parse(self, task: Task) -> Steps[None]:
        """Reads content and calls to the end of the text."""
        while opener := (yield from copy_content(task, self.openers)):
            before = opener + (yield from task.reader.run(SPACE))
            if (yield from task.reader.peek()) in ("{", "["):
                yield from copy_calls(task, before, _CLOSER)
            else:
                yield from attempt(task, _copy_call, before)


def _copy_call(task: Task) -> Steps[bool]:
    reader = task.reader
    name = (yield from reader.run(_NAME)).strip()
    yield from reader.skip(SPACE)
    tag = yield from reader.accept(_KEY, _CLOSER)
    if not tag or not is_name(name):
        return False
    task.sink.begin_call(name)
    writer = ObjectWriter(task.sink.arguments)
    schema = task.schemas.get(name, {})
    while tag == _KEY:
        key = (yield from reader.run(_NAME)).strip()
        if not (is_name(key) and (yield from reader.accept(_KEY_END))):
            return False
        yield from reader.skip(SPACE)
        if not (yield from reader.accept(_VALUE)):
            return False
        writer.key(key)
        types = types_of(schema, key)
        ends = frozenset({_VALUE_END})
        if not (yield from copy_text_value(reader, writer.emit, types, ends)):
            return False
        yield from reader.skip(SPACE)
        tag = yield from reader.accept(_KEY, _CLOSER)
    if not tag:
        return False
    writer.end()
    return True
