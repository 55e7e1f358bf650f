"""Schemas rewritten: only where a schema stands, and as the formats are defined."""

import datetime as dt
import re

import pytest

from jllm.text.json_schemas import (
    FORMATS,
    check_references,
    close_objects,
    map_schema,
    tighten_format,
)


def test_only_schemas_are_visited():
    data = {"type": "object", "format": "date"}
    schema = {
        "properties": {"format": {"type": "string"}, "a": {"format": "date"}},
        "items": [{"format": "date"}],
        "anyOf": [{"additionalProperties": {"format": "date"}}],
        "const": data,
        "enum": [data],
        "default": data,
    }
    seen = []
    map_schema(schema, lambda node: seen.append(node) or node)
    assert seen.count({"format": "date"}) == 3
    assert data not in seen
    assert len(seen) == 6
    changed = map_schema(schema, tighten_format)
    assert changed["const"] == changed["default"] == data
    assert changed["properties"]["a"]["allOf"] == [FORMATS["date"]]
    assert "allOf" not in schema["properties"]["a"]


def test_objects_are_closed_unless_they_say_so():
    schema = {
        "type": "object",
        "properties": {"a": {"properties": {}}, "b": {"additionalProperties": True}},
    }
    closed = map_schema(schema, close_objects)
    assert closed["additionalProperties"] is False
    assert closed["properties"]["a"]["additionalProperties"] is False
    assert closed["properties"]["b"]["additionalProperties"] is True


def test_a_format_keeps_the_rules_beside_it():
    schema = {"format": "hostname", "maxLength": 9, "allOf": [{"minLength": 2}]}
    rules = tighten_format(schema)["allOf"]
    assert rules == [{"minLength": 2}, FORMATS["hostname"]]
    assert tighten_format({"format": "uuid"}) == {"format": "uuid"}
    assert tighten_format({"format": 3}) == {"format": 3}


def test_an_id_beside_a_reference_is_refused_in_draft_7():
    schema = {"properties": {"a": {"$id": "x", "$ref": "y"}}}
    for draft in (None, "http://json-schema.org/draft-07/schema#"):
        with pytest.raises(ValueError, match=r"\$id beside \$ref"):
            check_references({"$schema": draft, **schema})
    new = "https://json-schema.org/draft/2020-12/schema"
    check_references({"$schema": new, **schema})


@pytest.mark.parametrize("year", [1900, 1999, 2000, 2020, 2021, 2024, 2100, 2400])
def test_dates_are_those_of_the_calendar(year):
    pattern = re.compile(FORMATS["date"]["pattern"])
    for month, day in [(1, 31), (2, 28), (2, 29), (12, 1)]:
        try:
            exists = bool(dt.date(year, month, day))
        except ValueError:
            exists = False
        assert bool(pattern.search(f"{year}-{month:02}-{day:02}")) == exists
