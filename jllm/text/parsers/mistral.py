"""Calls of Mistral's models, in the three ways of their tokenizers."""

import dataclasses
import re

from jllm.text.parsers.call_object import copy_arguments, copy_calls
from jllm.text.parsers.formats import Task, attempt, copy_content, is_name
from jllm.text.parsers.json_text import SPACE
from jllm.text.parsers.reader import Steps

_OPENER = "[TOOL_CALLS]"
_ARGUMENTS = "[ARGS]"
_ID = "[CALL_ID]"
_NAME = re.compile(r'[^\[\]{}"\n]*')
_ID_CHARACTERS = re.compile("[A-Za-z0-9]*")


@dataclasses.dataclass(frozen=True, slots=True)
class MistralCalls:
    """`[TOOL_CALLS]` before a list of call objects, or before each `name{…}`.

    Behind the name may stand `[CALL_ID]` with an id, and `[ARGS]`.
    """

    @property
    def openers(self) -> frozenset[str]:
        """The marker before calls."""
        return frozenset({_OPENER})

    @property
    def markers(self) -> frozenset[str]:
        """All markers."""
        return frozenset({_OPENER, _ARGUMENTS, _ID})

    def parse(self, task: Task) -> Steps[None]:
        """Reads content and calls to the end of the text."""
        while opener := (yield from copy_content(task, self.openers)):
            before = opener + (yield from task.reader.run(SPACE))
            if (yield from task.reader.peek()) in ("[", "{"):
                yield from copy_calls(task, before)
            else:
                yield from attempt(task, _copy_named, before)


def _copy_named(task: Task) -> Steps[bool]:
    name = (yield from task.reader.run(_NAME)).strip()
    call_id = None
    if (yield from task.reader.accept(_ID, _ARGUMENTS)) == _ID:
        call_id = yield from task.reader.run(_ID_CHARACTERS)
        yield from task.reader.accept(_ARGUMENTS)
    if not is_name(name):
        return False
    return (yield from copy_arguments(task, name, call_id))
