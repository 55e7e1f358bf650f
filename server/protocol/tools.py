"""Tools that a request offers, and which of them the model has to use."""

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import PydanticCustomError

from server.protocol.base import RequestModel

CHOICES = ("none", "auto", "required")
TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"type": "string", "enum": list(CHOICES)},
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"type": "string"}},
                },
            },
        },
        {"type": "null"},
    ]
}


class Function(RequestModel):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestModel):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: Function


def read_tool_choice(value: Any) -> Any:
    """A word, or the name of the function to call in the form {"function": name}."""
    if value is None or value in CHOICES:
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        function = value.get("function", value)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name:
            return {"function": name}
    raise PydanticCustomError(
        "tool_choice", "must be none, auto, required or the name of a function"
    )
