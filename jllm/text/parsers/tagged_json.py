"""Calls as JSON behind a marker: Hermes, Qwen 2.5 and 3, Granite and their like."""

import dataclasses

from jllm.text.parsers.call_object import copy_calls
from jllm.text.parsers.formats import Task, copy_content
from jllm.text.parsers.reader import Steps


@dataclasses.dataclass(frozen=True, slots=True)
class TaggedJson:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once for each call.

    A list of call objects behind one marker is read too.

    Attributes:
        opener: Marker before the JSON.
        closer: Marker behind it, which models sometimes forget; None: there is none.
    """

    opener: str
    closer: str | None = None

    @property
    def openers(self) -> frozenset[str]:
        """The marker before the JSON."""
        return frozenset({self.opener})

    @property
    def markers(self) -> frozenset[str]:
        """Both markers."""
        return frozenset({self.opener, self.closer or self.opener})

    def parse(self, task: Task) -> Steps[None]:
        """Reads content and calls to the end of the text."""
        while opener := (yield from copy_content(task, self.openers)):
            yield from copy_calls(task, opener, self.closer)
