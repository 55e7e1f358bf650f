"""What an output has to look like: the constraint of one request, checked and bounded.

Only shapes and sizes are checked here, in microseconds and without a tokenizer. Whether
a grammar can be compiled is found out beside the engine, under a time limit.
"""

import dataclasses
import json as jsonlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from jllm.errors import InvalidRequestError

ConstraintKind = Literal[
    "json", "regex", "choice", "grammar", "json_object", "structural_tag"
]
KINDS: tuple[ConstraintKind, ...] = (
    "json",
    "regex",
    "choice",
    "grammar",
    "json_object",
    "structural_tag",
)

MAX_SOURCE_BYTES = 256 * 1024
"""Length of a schema, regular expression, grammar, tag, or of all choices."""
MAX_JSON_DEPTH = {"json": 64, "structural_tag": 80}
"""Objects and lists within each other; a tag holds schemas."""
MAX_JSON_NODES = 10_000
"""Objects, lists, keys and values in all."""
MAX_CHOICES = 10_000


def _fail(kind: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"structured_outputs.{kind} {reason}", parameter="structured_outputs"
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form that an output must have; exactly one of the first six is set.

    Attributes:
        json: A JSON schema, as a mapping, as its text, or a boolean.
        regex: A regular expression that the whole output matches.
        choice: Strings, one of which is the output.
        grammar: A grammar in Lark's notation with llguidance's extensions, or in GBNF
            (EBNF with `::=`).
        json_object: True for any JSON object.
        structural_tag: Free text with constrained parts: a mapping or its text, in
            either form that vLLM takes: `structures` with `triggers`, or `format`.
        disable_any_whitespace: No whitespace between the tokens of JSON.
        disable_additional_properties: Objects of a JSON schema hold no properties that
            the schema does not name, unless it says so itself.
        whitespace_pattern: A regular expression for the whitespace between tokens of
            JSON; up to 32 characters where it is not set.
    """

    json: str | bool | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        """Checks and normalises; mappings become JSON text, choices a tuple.

        Raises:
            InvalidRequestError: Not exactly one constraint, or one of a wrong type or
                beyond a bound.
        """
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise InvalidRequestError(
                f"structured_outputs must set exactly one of {', '.join(KINDS)}; it "
                f"sets {found}",
                parameter="structured_outputs",
            )
        self._check_options()
        kind = given[0]
        value: Any = getattr(self, kind)
        if kind in ("json", "structural_tag"):
            value = _json_text(kind, value)
        elif kind == "choice":
            value = _choices(value)
        elif kind == "json_object":
            if value is not True:
                raise _fail(kind, "must be true where it is set")
        else:
            value = _source(kind, value)
        object.__setattr__(self, kind, value)

    @property
    def kind(self) -> ConstraintKind:
        """Which of the constraints is set."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    def _check_options(self) -> None:
        for field in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, field), bool):
                raise _fail(field, "must be true or false")
        if self.whitespace_pattern is not None:
            _source("whitespace_pattern", self.whitespace_pattern)
        uses_json = any(
            getattr(self, kind) is not None
            for kind in ("json", "json_object", "structural_tag")
        )
        for field in (
            "disable_any_whitespace",
            "disable_additional_properties",
            "whitespace_pattern",
        ):
            if getattr(self, field) and not uses_json:
                raise _fail(field, "applies to JSON only")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise _fail("whitespace_pattern", "contradicts disable_any_whitespace")


def make_structured_outputs(value: Any) -> StructuredOutputsParams | None:
    """Takes the parameters, a mapping with their fields, or None.

    Raises:
        InvalidRequestError: A field is unknown or wrong.
    """
    if value is None or isinstance(value, StructuredOutputsParams):
        return value
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            "structured_outputs must be StructuredOutputsParams or a mapping",
            parameter="structured_outputs",
        )
    fields = cast(Mapping[str, Any], value)
    known = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
    for name in fields:
        if name not in known:
            raise InvalidRequestError(
                f"structured_outputs has the unknown field {name!r}; known are "
                f"{', '.join(known)}",
                parameter="structured_outputs",
            )
    return StructuredOutputsParams(**fields)


def _source(kind: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _fail(kind, "must be a string, not empty")
    if "\0" in value:
        raise _fail(kind, "must not hold a NUL character")
    _check_size(kind, value)
    return value


def _check_size(kind: str, value: str) -> None:
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise _fail(kind, f"is no valid Unicode: {error.reason}") from error
    if size > MAX_SOURCE_BYTES:
        raise _fail(kind, f"has {size} bytes, at most {MAX_SOURCE_BYTES} are allowed")


def _choices(value: Any) -> tuple[str, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise _fail("choice", "must be a list of strings")
    choices = tuple(cast(Sequence[Any], value))
    if not choices:
        raise _fail("choice", "must not be empty")
    if len(choices) > MAX_CHOICES:
        raise _fail("choice", f"has {len(choices)} entries, at most {MAX_CHOICES}")
    for choice in choices:
        _source("choice", choice)
    _check_size("choice", "".join(choices))
    return choices


def _json_text(kind: Literal["json", "structural_tag"], value: Any) -> str:
    """The text of a JSON value within the bounds of size, depth and nodes."""
    is_text = isinstance(value, str)
    if is_text:
        _check_size(kind, value)
    try:
        parsed: Any = jsonlib.loads(value) if is_text else value
        _check_nesting(kind, parsed)
        text = jsonlib.dumps(parsed, ensure_ascii=False, allow_nan=False)
    except RecursionError as error:
        raise _fail(kind, f"is nested deeper than {MAX_JSON_DEPTH[kind]}") from error
    except (ValueError, TypeError) as error:
        raise _fail(kind, f"is no valid JSON: {error}") from error
    allowed = (dict, bool) if kind == "json" else (dict,)
    if not isinstance(parsed, allowed) and not isinstance(parsed, Mapping):
        raise _fail(kind, "must be a JSON object")
    _check_size(kind, text)
    return text


def _check_nesting(kind: Literal["json", "structural_tag"], value: Any) -> None:
    """Refuses a value beyond the bounds of depth and nodes; walks level by level."""
    level, num_nodes, depth = [value], 1, 0
    while level:
        below: list[Any] = []
        for node in level:
            if isinstance(node, Mapping):
                below += cast(Mapping[Any, Any], node).values()
            elif isinstance(node, (list, tuple)):
                below += cast(Sequence[Any], node)
        num_nodes += len(below)
        depth += 1
        if depth > MAX_JSON_DEPTH[kind]:
            raise _fail(kind, f"is nested deeper than {MAX_JSON_DEPTH[kind]}")
        if num_nodes > MAX_JSON_NODES:
            raise _fail(kind, f"has more than {MAX_JSON_NODES} values")
        level = below
