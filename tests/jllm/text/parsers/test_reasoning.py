"""Reasoning and answer are told apart, wherever the tags stand."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from jllm import (
    ContentDelta,
    ReasoningDelta,
    detect_parsers,
    make_output_parser,
    prompt_opens_reasoning,
    reasoning_markers,
)
from jllm.text.parsers.registry import REASONING_FORMATS
from tests.jllm.text.parsers.outputs import Parsed, cut, parse

CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
BOTH = Parsed("2 + 2 is easy.", "It is **4**.")
TAGGED = sorted(set(REASONING_FORMATS) - {"openai_gptoss"})


@pytest.mark.parametrize("name", TAGGED)
def test_both_tags(name):
    opener, closer = reasoning_markers(name)
    text = f"{opener}\n2 + 2 is easy.\n{closer}\n\nIt is **4**."
    assert parse([text], reasoning=name) == BOTH
    assert parse(text, reasoning=name) == BOTH


@pytest.mark.parametrize("name", TAGGED)
def test_first_tag_in_the_prompt(name):
    closer = reasoning_markers(name)[1]
    text = f"2 + 2 is easy.\n{closer}\n\nIt is **4**."
    assert parse(text, reasoning=name, starts_in_reasoning=True) == BOTH
    # Some models write the tag again.
    text = reasoning_markers(name)[0] + text
    assert parse(text, reasoning=name, starts_in_reasoning=True) == BOTH


@pytest.mark.parametrize("name", TAGGED)
def test_thinking_switched_off(name):
    text = " The tag is written </think>."
    assert parse(text, reasoning=name, starts_in_reasoning=False).content == text


def test_default_where_the_prompt_tells_nothing():
    text = "Hm.</think>Yes"
    assert parse(text, reasoning="deepseek_r1") == Parsed("Hm.", "Yes")
    assert parse("Yes", reasoning="qwen3") == Parsed(content="Yes")


def test_reasoning_that_does_not_end():
    assert parse("<think>Hm, ", reasoning="qwen3") == Parsed(reasoning="Hm, ")


def test_streams_at_once():
    parser = make_output_parser(reasoning="qwen3", tools=None)
    assert parser.push("<think>\na") == (ReasoningDelta("a"),)
    assert parser.push("b </thi") == (ReasoningDelta("b"),)
    assert parser.push("s") == (ReasoningDelta(" </this"),)
    assert parser.push("</think>\nc") == (ContentDelta("c"),)


def test_calls_behind_reasoning():
    text = f"<think>I need f.</think>\n\nLet me see.\n{CALL}"
    expected = Parsed("I need f.", "Let me see.", (("f", "{}"),))
    assert parse(text, "hermes", "qwen3") == expected
    # No content but white space.
    assert parse(f"<think>x</think>\n\n{CALL}", "hermes", "qwen3").content == ""


def test_calls_within_reasoning():
    text = f"<think>Should I write {CALL}"
    assert parse(text, "hermes", "qwen3") == Parsed(
        "Should I write", calls=(("f", "{}"),)
    )
    assert parse(text + "?</think>No.", "hermes", "glm45") == Parsed(
        f"Should I write {CALL}?", "No."
    )


def test_special_tokens_within_reasoning():
    parsed = parse(
        "<think>a<|x|>b</think>c<|x|>",
        reasoning="qwen3",
        special_tokens=["<think>", "<|x|>"],
    )
    assert parsed == Parsed("ab", "c")


WORDS = ["<think>", "</think>", "<", "\n", " ", "a", CALL, "[THINK]", "[/THINK]"]
WORDS += ["<|channel|>", "analysis", "final", "<|message|>", "<|end|>", "</seed:"]


@pytest.mark.parametrize("name", sorted(REASONING_FORMATS))
@given(
    parts=st.lists(st.sampled_from(WORDS), max_size=10),
    places=st.lists(st.integers(0, 1000), max_size=6),
    is_open=st.sampled_from([None, True, False]),
)
def test_result_does_not_depend_on_the_cuts(name, parts, places, is_open):
    text = "".join(parts)
    tools = "openai" if name == "openai_gptoss" else "hermes"
    whole = parse([text], tools, name, starts_in_reasoning=is_open)
    pieces = cut(text, places)
    assert parse(pieces, tools, name, starts_in_reasoning=is_open) == whole
    assert parse(text, tools, name, starts_in_reasoning=is_open) == whole


@pytest.mark.parametrize(
    ("name", "prompt", "expected"),
    [
        ("qwen3", "<|im_start|>assistant\n", None),
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("deepseek_v3", "<\uff5cAssistant\uff5c></think>", False),
        ("mistral", "[/INST]", None),
        ("openai_gptoss", "<|start|>assistant", None),
        ("openai_gptoss", "<|start|>assistant<|channel|>analysis<|message|>", True),
        ("openai_gptoss", "<|start|>assistant<|channel|>final<|message|>", False),
    ],
)
def test_prompt_tells(name, prompt, expected):
    assert prompt_opens_reasoning(name, prompt) is expected


EXPECTED = {
    "ByteDance-Seed-OSS": ("seed_oss", "seed_oss"),
    "GLM-4.6": ("glm45", "glm45"),
    "GLM-4.7-Flash": ("glm45", "glm47"),
    "HuggingFaceTB-SmolLM3-3B": ("qwen3", None),
    "Mistral-Small-3.2-24B-Instruct-2506": (None, "mistral"),
    "Qwen-QwQ-32B": ("qwen3", "hermes"),
    "Qwen-Qwen2.5-7B-Instruct": (None, "hermes"),
    "Qwen-Qwen3-0.6B": ("qwen3", "hermes"),
    "Qwen3-Coder": (None, "qwen3_coder"),
    "Qwen3.5-4B": ("qwen3", "qwen3_coder"),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("deepseek_v3", "deepseek_v3"),
    "deepseek-ai-DeepSeek-V3.1": ("deepseek_v3", "deepseek_v31"),
    "deepseek-ai-DeepSeek-V3.2": ("deepseek_v3", "deepseek_v32"),
    "deepseek-ai-DeepSeek-V4": ("deepseek_v3", "deepseek_v4"),
    "ibm-granite-granite-3.3-2B-Instruct": ("qwen3", "granite"),
    "microsoft-Phi-3.5-mini-instruct": (None, None),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("mistral", "mistral"),
    "mistralai-Mistral-Nemo-Instruct-2407": (None, "mistral"),
    "openai-gpt-oss-120b": ("openai_gptoss", "openai"),
    "unsloth-mistral-Devstral-Small-2507": (None, "mistral"),
}


def test_parsers_of_published_templates(shared_data):
    folder = shared_data / "data" / "chat_templates"
    files = folder.glob("*.jinja")
    found = {f.stem: detect_parsers(f.read_text("utf-8"), None) for f in files}
    assert found == EXPECTED


def test_detection_without_a_template():
    assert detect_parsers(None, "gpt_oss") == ("openai_gptoss", "openai")
    assert detect_parsers(None, "llama") == (None, None)
