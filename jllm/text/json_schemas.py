"""JSON schemas rewritten before they are compiled, so that what compiles holds."""

from collections.abc import Callable, Mapping
from typing import Any

ONE = (
    "additionalItems",
    "additionalProperties",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
)
LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
MAPS = (
    "$defs",
    "definitions",
    "dependencies",
    "dependentSchemas",
    "patternProperties",
    "properties",
)
"""Keywords that hold a schema, a list of schemas, or a mapping to schemas."""

NEW_DRAFT = "json-schema.org/draft/20"
LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
DATE = (
    "([0-9]{4}-(0[13-9]|1[0-2])-[0-9]{2}|[0-9]{4}-02-([01][0-9]|2[0-8])|"
    f"{LEAP_YEAR}-02-29)"
)
SECONDS = "[0-9]{2}:[0-9]{2}:[0-5][0-9]"
LABEL = "[A-Za-z0-9]+(-[A-Za-z0-9]+)*"
FORMATS: Mapping[str, Any] = {
    "date": {"pattern": f"^{DATE}$"},
    "date-time": {"pattern": f"^{DATE}.{SECONDS}"},
    "time": {"pattern": f"^{SECONDS}"},
    "hostname": {"pattern": rf"^{LABEL}(\.{LABEL})*$", "maxLength": 253},
}
"""What llguidance's formats leave out: the days of February, leap seconds at any minute
(none is generated), and internationalised labels of host names (none either)."""


def map_schema(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Applies a function to a schema and all schemas in it, the innermost first.

    Values that are no schemas, such as those of `const` and `enum`, are left alone.
    """
    if not isinstance(schema, dict):
        return schema
    new: dict[str, Any] = {}
    for key, value in schema.items():
        if key in MAPS and isinstance(value, dict):
            new[key] = {name: map_schema(s, change) for name, s in value.items()}
        elif key in LISTS and isinstance(value, list):
            new[key] = [map_schema(item, change) for item in value]
        elif key in ONE:
            new[key] = map_schema(value, change)
        else:
            new[key] = value
    return change(new)


def check_references(schema: Any) -> None:
    """Refuses what draft 7 reads differently, in schemas that name no later draft.

    Raises:
        ValueError: A `$ref` has an `$id` beside it, which draft 7 ignores.
    """

    def check(node: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in node and "$id" in node:
            raise ValueError("$id beside $ref is supported from draft 2019-09 on only")
        return node

    if isinstance(schema, dict) and NEW_DRAFT not in str(schema.get("$schema")):
        map_schema(schema, check)


def close_objects(schema: dict[str, Any]) -> dict[str, Any]:
    """Allows no properties besides those named, where the schema does not say."""
    is_object = schema.get("type") == "object" or "properties" in schema
    if is_object and "additionalProperties" not in schema:
        return {**schema, "additionalProperties": False}
    return schema


def tighten_format(schema: dict[str, Any]) -> dict[str, Any]:
    """Adds to some formats of strings what their definitions ask for."""
    name = schema.get("format")
    rule: Mapping[str, Any] | None = (
        FORMATS.get(name) if isinstance(name, str) else None
    )
    if rule is None:
        return schema
    return {**schema, "allOf": [*schema.get("allOf", ()), rule]}
