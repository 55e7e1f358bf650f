"""What a parser gives: pieces of reasoning, of content and of tool calls."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks before it answers.

    Attributes:
        text: Never empty.
    """

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer.

    Attributes:
        text: Never empty.
    """

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The head of a tool call or more of its arguments.

    Attributes:
        index: Which call of the output, from 0.
        id: Name of the call, in its first delta only.
        name: Function called, in its first delta only.
        arguments: JSON text of an object; the pieces of a call together are valid
            unless the output ends or goes wrong within them.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


Delta = ReasoningDelta | ContentDelta | ToolCallDelta
