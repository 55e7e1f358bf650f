"""The reasoning of a request in tokens."""

import pytest

from jllm.errors import InvalidRequestError
from jllm.text.prompts import PromptProcessor
from jllm.text.thinking import make_thinking
from jllm.types import SamplingParams
from tests.fakes import VOCAB_SIZE, byte_tokenizer


def thinking(prompt="", **options):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    return make_thinking(tokenizer, SamplingParams(**options), ids)


def test_markers_and_budget():
    found = thinking(reasoning_parser="qwen3", thinking_token_budget=7)
    assert bytes(found.start_ids) == b"<think>"
    assert bytes(found.end_ids) == b"</think>"
    assert [bytes(ids) for ids in found.other_ends] == [b"<tool_call>"]
    assert found.budget == 7


@pytest.mark.parametrize(
    ("parser", "prompt", "is_open"),
    [
        ("qwen3", "Hi", None),
        ("qwen3", "assistant\n<think>\n", True),
        ("qwen3", "<think>\n\n</think>\n\n", False),
        ("deepseek_r1", "Hi", True),
        ("openai_gptoss", "<|start|>assistant", None),
    ],
)
def test_prompt_tells_whether_it_is_open(parser, prompt, is_open):
    found = thinking(prompt, reasoning_parser=parser, thinking_token_budget=1)
    assert found.is_open is is_open


def test_nothing_to_bound():
    assert thinking(reasoning_parser="qwen3") is None
    assert thinking(reasoning_parser="qwen3", thinking_token_budget=-1) is None
    form = {"json_object": True}
    found = thinking(reasoning_parser="qwen3", structured_outputs=form)
    assert found.budget is None
    # Its grammars describe whole messages.
    options = {"reasoning_parser": "openai_gptoss", "structured_outputs": form}
    assert thinking(**options) is None


@pytest.mark.parametrize("budget", [-2, 1.5, True, "7"])
def test_wrong_budgets(budget):
    with pytest.raises(InvalidRequestError, match="thinking_token_budget"):
        SamplingParams(thinking_token_budget=budget)


def test_wrong_parsers():
    with pytest.raises(InvalidRequestError, match="reasoning_parser='x'") as caught:
        thinking(reasoning_parser="x", thinking_token_budget=1)
    assert caught.value.parameter == "reasoning_parser"
    processor = PromptProcessor(
        byte_tokenizer(), vocab_size=VOCAB_SIZE, max_model_len=64
    )
    with pytest.raises(InvalidRequestError, match="needs reasoning_parser"):
        processor.prepare("r", "Hi", SamplingParams(thinking_token_budget=3))


def test_markers_that_the_model_does_not_know():
    processor = PromptProcessor(byte_tokenizer(), vocab_size=64, max_model_len=64)
    params = SamplingParams(reasoning_parser="qwen3", thinking_token_budget=3)
    with pytest.raises(InvalidRequestError, match="does not know"):
        processor.prepare("r", [1, 2], params)
