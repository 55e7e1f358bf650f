"""The embedded model, made to call and to stop thinking, as the parsers read it."""

import json

import jsonschema
import pytest

from jllm import (
    LLM,
    ContentDelta,
    ReasoningDelta,
    SamplingParams,
    ToolCallDelta,
    make_output_parser,
    tool_constraint,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "animal": {"enum": ["dog", "cat", "frog"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
        "tame": {"type": "boolean"},
    },
    "required": ["animal", "count"],
}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def llm():
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_blocks": 256}
    with LLM(compile_ahead=False, **options) as llm:
        yield llm


def parse(text, **names):
    parser = make_output_parser(**names, tool_schemas=TOOLS)
    return [*parser.push(text), *parser.finish()]


@pytest.mark.parametrize("parser", ["hermes", "qwen3_coder", "llama3_json", "mistral"])
def test_calls_are_valid_by_schema(llm, parser):
    params = SamplingParams(
        n=4,
        temperature=1.0,
        seed=7,
        max_tokens=120,
        structured_outputs=tool_constraint(parser, TOOLS, "required"),
    )
    (output,) = llm.generate("Once upon a time", params)
    ended = [c for c in output.outputs if c.finish_reason == "stop"]
    assert ended
    for completion in ended:
        calls = {}
        for delta in parse(completion.text, reasoning=None, tools=parser):
            assert isinstance(delta, ToolCallDelta)
            assert delta.name in (None, "find")
            calls[delta.index] = calls.get(delta.index, "") + delta.arguments
        assert calls
        for arguments in calls.values():
            jsonschema.validate(json.loads(arguments), SCHEMA)


def test_reasoning_keeps_to_its_budget(llm):
    """The model knows no end of reasoning, and is made to write it."""
    params = SamplingParams(
        temperature=1.0,
        seed=3,
        max_tokens=80,
        reasoning_parser="deepseek_r1",
        thinking_token_budget=12,
        structured_outputs={"choice": ["yes indeed", "no"]},
    )
    (output,) = llm.generate("Once upon a time", params)
    completion = output.outputs[0]
    reasoning, content = parse(completion.text, reasoning="deepseek_r1", tools=None)
    assert isinstance(reasoning, ReasoningDelta)
    assert content in (ContentDelta("yes indeed"), ContentDelta("no"))
    tokenizer = llm.get_tokenizer()
    marker = tokenizer.encode("</think>", add_special_tokens=False)
    answer = tokenizer.encode(content.text, add_special_tokens=False)
    # The answer may be cut into tokens in another way than the tokenizer does.
    assert 12 + len(marker) < len(completion.token_ids)
    assert len(completion.token_ids) <= 12 + len(marker) + len(content.text) + 1
    assert completion.token_ids[12 : 12 + len(marker)] == marker
    assert answer


def test_budget_without_a_grammar(llm):
    params = SamplingParams(
        temperature=0.0,
        max_tokens=60,
        reasoning_parser="deepseek_r1",
        thinking_token_budget=0,
    )
    (output,) = llm.generate("Once upon a time", params)
    (content,) = parse(output.outputs[0].text, reasoning="deepseek_r1", tools=None)
    assert isinstance(content, ContentDelta)
    assert output.outputs[0].text.startswith("</think>")
