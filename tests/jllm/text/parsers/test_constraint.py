"""Calls that a grammar forces are calls that the parser reads, valid by schema."""

import functools
import json
import random

import jsonschema
import numpy as np
import pytest

from jllm import tool_constraint
from jllm.errors import ConfigError, InvalidRequestError
from jllm.text.parsers.registry import TOOL_FORMATS
from jllm.text.structured import compile_grammar, make_vocabulary
from tests.fakes import byte_tokenizer
from tests.jllm.text.parsers.outputs import parse

SCHEMA = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "where": {"$ref": "#/$defs/place"},
    },
    "required": ["unit", "where"],
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}},
            "required": ["city"],
            "additionalProperties": False,
        }
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}


@functools.cache
def vocabulary():
    return make_vocabulary(byte_tokenizer())


def random_output(constraint, seed, max_tokens=400):
    """Samples any token that the grammar allows; None if it does not end in time."""
    matcher = compile_grammar(constraint, vocabulary()).copy()
    rng = random.Random(seed)
    output = bytearray()
    for _ in range(max_tokens):
        if matcher.is_stopped() or (matcher.is_accepting() and rng.random() < 0.5):
            return output.decode("utf-8", errors="replace")
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        # Mostly ASCII, which ends free strings sooner.
        choices = [t for t in allowed if t < 128]
        if not choices or rng.random() < 0.2:
            choices = [t for t in allowed if t < 256]
        if not choices:
            return output.decode("utf-8", errors="replace")
        token = rng.choice(choices)
        assert matcher.consume_token(int(token))
        output.append(token)
    return None


@pytest.mark.parametrize("parser", sorted(TOOL_FORMATS))
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_random_outputs_are_calls(parser, choice):
    constraint = tool_constraint(parser, TOOLS, choice)
    outputs = [random_output(constraint, seed) for seed in range(6)]
    finished = [text for text in outputs if text is not None]
    assert len(finished) >= 3
    for text in finished:
        for streams in (True, False):
            parsed = parse([text], parser, stream_arguments=streams)
            assert parsed.content == ""
            assert parsed.calls
            check(parsed.calls)
            if choice is NAMED:
                assert [name for name, _ in parsed.calls] == ["weather"]


def check(calls):
    for name, arguments in calls:
        values = json.loads(arguments)
        if name == "weather":
            jsonschema.validate(values, SCHEMA)
        else:
            assert (name, values) == ("now", {})


@pytest.mark.parametrize("parser", sorted(TOOL_FORMATS))
def test_parallel_calls(parser):
    many = tool_constraint(parser, TOOLS, "required")
    one = tool_constraint(parser, TOOLS, "required", parallel_tool_calls=False)
    numbers = {True: set(), False: set()}
    for seed in range(12):
        for constraint in (many, one):
            text = random_output(constraint, seed)
            if text is not None:
                calls = parse([text], parser).calls
                numbers[constraint is many].add(len(calls))
    assert numbers[False] == {1}
    assert (max(numbers[True]) > 1) == (parser != "openai")


def test_nothing_to_constrain():
    assert tool_constraint("hermes", TOOLS, "auto") is None
    assert tool_constraint("hermes", [], "none") is None


@pytest.mark.parametrize(
    ("tools", "choice", "word"),
    [
        ([], "required", "needs tools"),
        (TOOLS, {"type": "function", "function": {"name": "x"}}, "'x'.*none of"),
        (TOOLS, "sometimes", "sometimes"),
        (TOOLS, {"type": "function"}, "name a function"),
    ],
)
def test_wrong_choices(tools, choice, word):
    with pytest.raises(InvalidRequestError, match=word) as caught:
        tool_constraint("hermes", tools, choice)
    assert caught.value.parameter == "tool_choice"


def test_unknown_parser():
    with pytest.raises(ConfigError, match="tool_call_parser"):
        tool_constraint("x", TOOLS, "required")
