"""The type alone: exactly one constraint, right types, bounds of size and depth."""

import json

import pytest

from jllm import InvalidRequestError, SamplingParams, StructuredOutputsParams
from jllm.structured_outputs import MAX_JSON_NODES, MAX_SOURCE_BYTES


def nested(depth):
    schema = True
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"json": {"type": "object"}}, "json"),
        ({"json": '{"type": "object"}'}, "json"),
        ({"json": True}, "json"),
        ({"json": nested(64)}, "json"),
        ({"regex": "a+"}, "regex"),
        ({"choice": ["a", "b"]}, "choice"),
        ({"grammar": 'start: "a"'}, "grammar"),
        ({"json_object": True}, "json_object"),
        ({"json_object": True, "disable_any_whitespace": True}, "json_object"),
        ({"json": {}, "whitespace_pattern": " "}, "json"),
        ({"structural_tag": {"structures": [], "triggers": []}}, "structural_tag"),
        ({"structural_tag": nested(80)}, "structural_tag"),
    ],
)
def test_one_constraint(fields, kind):
    constraint = StructuredOutputsParams(**fields)
    assert constraint.kind == kind
    assert constraint == StructuredOutputsParams(**fields)
    assert hash(constraint) == hash(StructuredOutputsParams(**fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one of json, regex, choice"),
        ({"regex": "a", "choice": ["b"]}, "it sets regex and choice"),
        ({"json": "{"}, "structured_outputs.json is no valid JSON"),
        ({"json": "[]"}, "json must be a JSON object"),
        ({"json": 3}, "json must be a JSON object"),
        ({"json": {"a": float("nan")}}, "json is no valid JSON"),
        ({"json": {"a": object()}}, "json is no valid JSON"),
        ({"json": nested(65)}, "nested deeper than 64"),
        ({"json": json.dumps(nested(400))}, "nested deeper than 64"),
        ({"json": "[" * 200_000}, "nested deeper than 64"),
        ({"json": {"enum": list(range(MAX_JSON_NODES))}}, "more than 10000 values"),
        ({"json": {"const": "a" * MAX_SOURCE_BYTES}}, f"{MAX_SOURCE_BYTES} are"),
        ({"structural_tag": nested(81)}, "nested deeper than 80"),
        ({"structural_tag": True}, "must be a JSON object"),
        ({"regex": ""}, "regex must be a string, not empty"),
        ({"regex": "a\0"}, "NUL"),
        ({"regex": "\ud800"}, "no valid Unicode"),
        ({"regex": "a" * (MAX_SOURCE_BYTES + 1)}, "at most"),
        ({"grammar": 7}, "grammar must be a string"),
        ({"choice": []}, "choice must not be empty"),
        ({"choice": "abc"}, "choice must be a list"),
        ({"choice": ["a", 1]}, "choice must be a string"),
        ({"choice": ["a"] * 10_001}, "at most 10000"),
        ({"json_object": False}, "json_object must be true"),
        ({"regex": "a", "disable_any_whitespace": True}, "applies to JSON only"),
        ({"json": {}, "disable_any_whitespace": 1}, "must be true or false"),
        (
            {"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "},
            "contradicts",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(fields, words):
    with pytest.raises(InvalidRequestError, match="structured_outputs") as error:
        StructuredOutputsParams(**fields)
    assert words in str(error.value)
    assert error.value.parameter == "structured_outputs"


def test_mappings_are_taken_as_parameters():
    params = SamplingParams(structured_outputs={"choice": ["a"]})
    assert params.structured_outputs == StructuredOutputsParams(choice=["a"])
    same = SamplingParams(structured_outputs=params.structured_outputs)
    assert same == params
    assert SamplingParams().structured_outputs is None


@pytest.mark.parametrize("value", ["abc", 3, {"guided_json": {}}, {}])
def test_other_values_are_refused(value):
    with pytest.raises(InvalidRequestError, match="structured_outputs"):
        SamplingParams(structured_outputs=value)
