"""Reasoning between two tags, whose first may stand in the prompt already."""

import dataclasses
import re

from jllm.text.parsers.formats import Task
from jllm.text.parsers.reader import Steps

_BLANK = re.compile(r"\s*")


@dataclasses.dataclass(frozen=True, slots=True)
class TaggedReasoning:
    """`<think>…</think>` before the answer.

    Attributes:
        opener: Tag that begins it.
        closer: Tag that ends it.
        opens_by_default: Whether an output is reasoning from its start where the
            prompt tells nothing.
        call_openers: Markers of tool calls that end it too, as models forget its end.
    """

    opener: str = "<think>"
    closer: str = "</think>"
    opens_by_default: bool = False
    call_openers: frozenset[str] = frozenset()

    @property
    def markers(self) -> frozenset[str]:
        """Both tags."""
        return frozenset({self.opener, self.closer})

    def parse(
        self, task: Task, *, is_open: bool | None, call_openers: frozenset[str]
    ) -> Steps[None]:
        """Reads the reasoning at the start of an output, if there is any.

        Args:
            task: What is parsed.
            is_open: Whether the prompt has opened it, None where that is not known.
            call_openers: Markers with which tool calls begin, if they are read.
        """
        blank = yield from task.reader.run(_BLANK)
        opened = yield from task.reader.accept(self.opener)
        is_open = self.opens_by_default if is_open is None else is_open
        if not (opened or is_open):
            task.sink.content(blank)
            return
        task.sink.seam()
        ends = frozenset({self.closer}) | (self.call_openers & call_openers)
        markers = ends | task.ignored
        while True:
            text, marker = yield from task.reader.piece(markers)
            task.sink.reasoning(text)
            if not (text or marker):
                return
            if marker in ends:
                break
        task.sink.seam()
        if marker != self.closer:
            task.reader.put_back(marker)

    def opened_by(self, prompt: str) -> bool | None:
        """Whether an output of this prompt begins within reasoning.

        None where the prompt ends with neither tag, so that the model decides.
        """
        end = prompt[-_MAX_BLANK_END:].rstrip()
        if end.endswith(self.opener):
            return True
        return False if end.endswith(self.closer) else None


_MAX_BLANK_END = 256
