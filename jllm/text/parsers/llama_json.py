"""Calls of Llama 3 and 4 as bare JSON objects."""

import dataclasses
import re

from jllm.text.parsers.call_object import copy_full_object
from jllm.text.parsers.formats import Task, attempt, copy_content
from jllm.text.parsers.json_text import SPACE
from jllm.text.parsers.reader import Steps

_TAG = "<|python_tag|>"
_BLANK = re.compile(r"\s*")


@dataclasses.dataclass(frozen=True, slots=True)
class LlamaJson:
    """`{"name": …, "parameters": {…}}` at the start or behind `<|python_tag|>`.

    Several are separated by semicolons. An object without parameters is content, since
    nothing but its keys tells a call from an answer in JSON.
    """

    @property
    def openers(self) -> frozenset[str]:
        """The tag, though calls come without it too."""
        return frozenset({_TAG})

    @property
    def markers(self) -> frozenset[str]:
        """The tag."""
        return self.openers

    def parse(self, task: Task) -> Steps[None]:
        """Reads content and calls to the end of the text."""
        reader = task.reader
        before = yield from reader.run(_BLANK)
        before += yield from reader.accept(_TAG)
        while True:
            before += yield from reader.run(SPACE)
            while (yield from reader.peek()) == "{":
                if not (yield from attempt(task, copy_full_object, before)):
                    before = ""
                    break
                yield from reader.skip(SPACE)
                before = yield from reader.accept(";", ",")
                before += yield from reader.run(SPACE)
            # What belongs to no call: a separator or a tag.
            task.sink.content(before)
            before = yield from copy_content(task, self.openers)
            if not before:
                return
