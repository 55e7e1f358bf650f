"""Calls in a section, each between tags of its own: DeepSeek and Kimi."""

import dataclasses
import re

from jllm.text.parsers.call_object import copy_arguments
from jllm.text.parsers.formats import (
    Task,
    attempt_section,
    copy_content,
    is_name,
)
from jllm.text.parsers.json_text import SPACE
from jllm.text.parsers.reader import Steps

_HEAD = re.compile(r"[^<\n{]*")
_FENCE = "```"


@dataclasses.dataclass(frozen=True, slots=True)
class SectionCalls:
    """`<calls><call>name<separator>{…}<call end><calls end>`.

    Attributes:
        opener: Before the calls.
        closer: Behind them.
        call: Before each call.
        call_end: Behind each call.
        separator: Between what stands before and the arguments.
        has_type: Whether the word "function" stands before the separator, and behind
            it the name and a fenced block with the arguments (DeepSeek V3 and R1).
        has_id: Whether the name is an id such as `functions.name:0` (Kimi).
    """

    opener: str
    closer: str
    call: str
    call_end: str
    separator: str
    has_type: bool = False
    has_id: bool = False

    @property
    def openers(self) -> frozenset[str]:
        """The section's and, since models forget that one, the call's."""
        return frozenset({self.opener, self.call})

    @property
    def markers(self) -> frozenset[str]:
        """All tags."""
        tags = {self.opener, self.closer, self.call, self.call_end, self.separator}
        return frozenset(tags)

    def parse(self, task: Task) -> Steps[None]:
        """Reads content and calls to the end of the text."""
        tags = self.call, self.closer
        while opener := (yield from copy_content(task, self.openers)):
            yield from attempt_section(task, opener, self._copy_call, tags)

    def _copy_call(self, task: Task) -> Steps[bool]:
        reader = task.reader
        head = (yield from reader.run(_HEAD)).strip()
        if not (yield from reader.accept(self.separator)):
            return False
        if self.has_type:
            head = (yield from reader.run(_HEAD)).strip()
            yield from reader.skip(SPACE)
            yield from reader.accept(_FENCE + "json", _FENCE)
        name, call_id = head, None
        if self.has_id:
            name, call_id = head.removeprefix("functions.").partition(":")[0], head
        if not is_name(name) or not (yield from copy_arguments(task, name, call_id)):
            return False
        yield from reader.skip(SPACE)
        if self.has_type and (yield from reader.accept(_FENCE)):
            yield from reader.skip(SPACE)
        yield from reader.accept(self.call_end)
        return True
