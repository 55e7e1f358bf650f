"""Published chat templates, rendered as transformers renders them."""

import copy
import re

import jinja2
import pytest

from jllm.errors import InvalidRequestError
from jllm.text.chat_template import ChatOptions, render_chat
from tests.fakes import byte_tokenizer

TOOL = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Where"}},
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": TOOL}]
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Well"}
SYSTEM = {"role": "system", "content": "Be brief."}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "5 degrees"}


def call(arguments):
    function = {"name": "weather", "arguments": arguments}
    return {"id": "abcdefghi", "type": "function", "function": function}


def calls(content, arguments):
    return {"role": "assistant", "content": content, "tool_calls": [call(arguments)]}


AS_SENT = calls(None, '{"city": "Köln"}')
AS_RENDERED = calls("", {"city": "Köln"})
PARTS = {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]}
THOUGHT = {**ANSWER, "reasoning_content": "Hm."}
OPEN = {"add_generation_prompt": False, "continue_final_message": True}

# Name to: the conversation as a client sends it, as transformers gets it, options.
CONVERSATIONS = {
    "plain": ([USER], None, {}),
    "system": ([SYSTEM, USER], None, {}),
    "turns": ([USER, ANSWER, {**USER, "content": "And you?"}], None, {}),
    "parts": ([PARTS], [{"role": "user", "content": "a\nb"}], {}),
    "tools": ([USER], None, {"tools": TOOLS}),
    "system and tools": ([SYSTEM, USER], None, {"tools": TOOLS}),
    "call": ([USER, AS_SENT], [USER, AS_RENDERED], {"tools": TOOLS}),
    "result": ([USER, AS_SENT, RESULT], [USER, AS_RENDERED, RESULT], {"tools": TOOLS}),
    "content and call": (
        [USER, calls("Let me see.", '{"city": "Bonn"}'), RESULT, ANSWER, USER],
        [USER, calls("Let me see.", {"city": "Bonn"}), RESULT, ANSWER, USER],
        {"tools": TOOLS},
    ),
    "no arguments": ([USER, calls(None, "")], [USER, calls("", {})], {"tools": TOOLS}),
    "reasoning": (
        [USER, THOUGHT, USER],
        [USER, {**THOUGHT, "reasoning": "Hm."}, USER],
        {},
    ),
    "no generation prompt": ([USER, ANSWER], None, {"add_generation_prompt": False}),
    "continued": ([USER, ANSWER], None, OPEN),
    "thinking on": ([USER], None, {"enable_thinking": True, "thinking": True}),
    "thinking off": ([USER], None, {"enable_thinking": False, "thinking": False}),
    "effort": ([USER], None, {"reasoning_effort": "low"}),
    "empty tools": ([USER], None, {"tools": []}),
    # Some refuse it, all in the same words.
    "two users": ([USER, USER], None, {}),
    "unknown role": ([{**USER, "role": "weather"}], None, {}),
}
REFUSED_BY_ALL_OR_NONE = {"two users", "unknown role", "continued"}


@pytest.fixture(scope="module")
def templates(shared_data):
    files = sorted((shared_data / "data" / "chat_templates").glob("*.jinja"))
    assert len(files) == 20
    return {file.stem: file.read_text("utf-8") for file in files}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def ours(tokenizer, template, messages, options):
    options = dict(options)
    names = ("tools", "add_generation_prompt", "continue_final_message")
    known = {name: options.pop(name) for name in names if name in options}
    chat = ChatOptions(chat_template=template, template_kwargs=options, **known)
    return render_chat(tokenizer, copy.deepcopy(messages), chat)


def theirs(tokenizer, template, messages, options):
    options = {"add_generation_prompt": True, **options}
    return tokenizer.hf.apply_chat_template(
        copy.deepcopy(messages), chat_template=template, tokenize=False, **options
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_renders_as_transformers_does(templates, tokenizer, name):
    sent, rendered, options = CONVERSATIONS[name]
    num_rendered = 0
    for template in templates.values():
        expected, reason = "", None
        try:
            expected = theirs(tokenizer, template, rendered or sent, options)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = str(error)
        if reason is None:
            assert ours(tokenizer, template, sent, options) == expected
            num_rendered += 1
            continue
        with pytest.raises(InvalidRequestError, match=re.escape(reason)):
            ours(tokenizer, template, sent, options)
    # All of them render what they are made for.
    assert num_rendered == 20 or name in REFUSED_BY_ALL_OR_NONE
    assert num_rendered > 0


def test_developer_is_system(templates, tokenizer):
    developer = {**SYSTEM, "role": "developer"}
    for template in templates.values():
        text = ours(tokenizer, template, [developer, USER], {})
        assert "Be brief." in text
        assert text == ours(tokenizer, template, [SYSTEM, USER], {})


def test_reasoning_by_either_name(templates, tokenizer):
    """The name that a client sends it by does not matter."""
    turn = {"role": "assistant", "content": "", "tool_calls": [call("{}")]}
    shown = 0
    for template in templates.values():
        texts = {
            ours(tokenizer, template, [USER, {**turn, name: "Hm?!"}, RESULT], {})
            for name in ("reasoning", "reasoning_content")
        }
        assert len(texts) == 1
        shown += "Hm?!" in texts.pop()
    assert shown == 6
