"""Constrained outputs of the embedded model, read back by other libraries."""

import asyncio
import json
import re

import jsonschema
import pytest

from jllm import LLM, AsyncLLM, InvalidRequestError, SamplingParams
from jllm.types import RequestOutputKind
from tests.fakes import FakeEngine

PROMPT = "Once upon a time"
SEEDS = range(3)
SCHEMAS = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
            "born": {"type": "string", "format": "date"},
        },
        "required": ["name", "age", "tags", "born"],
        "additionalProperties": False,
    },
    "union": {"anyOf": [{"type": "null"}, {"const": {"a": [1, "x"]}}]},
    "recursive": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {}]}},
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
}
REGEXES = [r"[0-9]{3}-[a-f]{2,5}", r"(é|😀|x\$)+y", r"\w+ \w+\."]
CHOICES = ["yes", "no", 'may "be"\n']


@pytest.fixture(scope="module")
def llm():
    llm = LLM(
        max_num_seqs=16, max_num_batched_tokens=128, num_blocks=900, compile_ahead=False
    )
    yield llm
    llm.close()


def params(constraint, **fields):
    fields = {"temperature": 1.0, "max_tokens": 160} | fields
    return SamplingParams(structured_outputs=constraint, **fields)


def test_all_outputs_are_valid_and_others_unchanged(llm):
    free = [SamplingParams(max_tokens=40, seed=i, temperature=1.0) for i in range(3)]
    constraints = [
        *({"json": schema, "whitespace_pattern": " "} for schema in SCHEMAS.values()),
        *({"regex": regex} for regex in REGEXES),
        {"choice": CHOICES},
        {"json_object": True},
    ]
    bound = [params(c, seed=s, n=2) for c in constraints for s in SEEDS]
    before = llm.generate([PROMPT] * 3, free, use_tqdm=False)
    outputs = llm.generate([PROMPT] * (3 + len(bound)), [*free, *bound], use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs[:3]] == [
        o.outputs[0].token_ids for o in before
    ]
    ended = 0
    for output, asked in zip(outputs[3:], bound, strict=True):
        for completion in output.outputs:
            if completion.finish_reason == "stop":
                ended += 1
                check(completion.text, asked.structured_outputs)
            else:
                assert completion.finish_reason == "length"
                assert len(completion.token_ids) == 160
    # Free strings and free objects may outrun the budget, the others cannot.
    assert ended > len(bound)


def check(text, constraint):
    if constraint.json is not None:
        jsonschema.validate(json.loads(text), json.loads(constraint.json))
    elif constraint.regex is not None:
        assert re.fullmatch(constraint.regex, text)
    elif constraint.choice is not None:
        assert text in constraint.choice
    else:
        assert isinstance(json.loads(text), dict)


def test_stop_strings_and_streams(llm):
    asked = params({"regex": "ab{30}c"}, stop="bbbb", include_stop_str_in_output=True)
    assert llm.generate(PROMPT, asked, use_tqdm=False)[0].outputs[0].text == "abbbb"
    asked = params({"choice": CHOICES}, output_kind=RequestOutputKind.DELTA, seed=1)
    texts = [output.outputs[0].text for output in llm.stream(PROMPT, asked)]
    assert "".join(texts) in CHOICES


def test_tags_in_free_text(llm):
    tag = {
        "begin": " the",
        "content": {"type": "regex", "pattern": "[0-9]{2}"},
        "end": "!",
    }
    form = {"type": "triggered_tags", "triggers": [" the"], "tags": [tag]}
    constraint = {"structural_tag": {"type": "structural_tag", "format": form}}
    asked = params(constraint, n=4, seed=0, max_tokens=60)
    texts = [o.text for o in llm.generate(PROMPT, asked, use_tqdm=False)[0].outputs]
    found = [m for text in texts for m in re.finditer(" the(.{0,3})", text)]
    assert len(found) > 4
    cut = [m for m in found if m.end() == len(m.string)]
    assert all(re.fullmatch("[0-9]{2}!", m[1]) for m in found if m not in cut)


def test_errors_name_the_field_before_anything_runs(llm):
    steps = llm.engine.metrics.steps
    with pytest.raises(
        InvalidRequestError, match=r"prompt 0: structured_outputs\.regex"
    ):
        llm.generate(PROMPT, params({"regex": "("}), use_tqdm=False)
    assert llm.engine.metrics.steps == steps


def test_a_sample_of_the_schema_suite(llm, shared_data):
    folder = shared_data / "data" / "json_schema_test_suite" / "tests" / "draft2020-12"
    names = ("enum", "required", "items", "pattern", "format", "anyOf", "minimum")
    cases = [
        case["schema"]
        for name in names
        for case in json.loads((folder / f"{name}.json").read_text())
    ]
    accepted = []
    for schema in cases:
        try:
            asked = params({"json": schema}, seed=len(accepted), max_tokens=48)
            llm._processor.prepare("a", PROMPT, asked)
            accepted.append(asked)
        except InvalidRequestError as error:
            assert error.parameter == "structured_outputs"  # noqa: PT017
    assert len(accepted) > 0.6 * len(cases)
    outputs = llm.generate([PROMPT] * len(accepted), accepted, use_tqdm=False)
    ended = [
        (json.loads(asked.structured_outputs.json), json.loads(output.outputs[0].text))
        for output, asked in zip(outputs, accepted, strict=True)
        if output.outputs[0].finish_reason == "stop"
    ]
    assert len(ended) > len(accepted) / 2
    kind = jsonschema.Draft202012Validator
    for schema, value in ended:
        # The library reads patterns as Python does, which knows no Unicode classes.
        if r"\p{" not in json.dumps(schema).replace("\\\\", "\\"):
            kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)


def test_online_compiles_beside_the_event_loop(monkeypatch):
    engine = FakeEngine(lambda request, index: b"yes")
    monkeypatch.setattr("jllm.async_llm.create_engine", lambda config: engine)
    seen = []
    add = engine.add
    monkeypatch.setattr(
        engine, "add", lambda request: seen.append(request) or add(request)
    )

    async def last(outputs):
        return [output async for output in outputs][-1]

    async def main():
        async with AsyncLLM("model") as online:
            asked = params({"choice": ["yes", "no"]})
            output = await last(online.generate("a", asked))
            assert output.outputs[0].text == "yes"
            with pytest.raises(InvalidRequestError, match=r"structured_outputs\.regex"):
                await last(online.generate("a", params({"regex": "("})))
            assert online.num_open == 0

    asyncio.run(main())
    (request,) = seen
    assert request.grammar.num_bytes > 0
