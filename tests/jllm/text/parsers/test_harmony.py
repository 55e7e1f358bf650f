"""The format of gpt-oss: channels, recipients, and the published vectors."""

import base64
import json

import pytest

from tests.jllm.text.parsers.outputs import Parsed, parse

BOTH = {"tools": "openai", "reasoning": "openai_gptoss"}


def vector(shared_data, name):
    text = (shared_data / "data" / "harmony_vectors" / f"{name}.txt").read_text("utf-8")
    return text.removesuffix("\n")


def answers(text):
    """What the model wrote in a conversation: the messages of the assistant."""
    return text.partition("<|start|>assistant")[2]


def test_streamable_parser(shared_data):
    text = vector(shared_data, "test_streamable_parser")
    query = {"query": "current US president July 2025", "topn": 10, "source": "news"}
    for pieces in ([text], text):
        parsed = parse(pieces, **BOTH)
        assert parsed.reasoning.startswith(
            'User asks "Who is the current US president?"'
        )
        assert parsed.reasoning.endswith("Let's browse to confirm.")
        ((name, arguments),) = parsed.calls
        assert (name, json.loads(arguments)) == ("browser.search", query)
        # What the tool is made to answer is no call and no reasoning.
        assert parsed.content == '{"result": "https://openai.com/"}'


def test_tool_response(shared_data):
    text = vector(shared_data, "test_tool_response_parsing")
    assert parse(text, **BOTH).content.strip() == '{"result": "https://openai.com/"}'


def test_ongoing_analysis(shared_data):
    text = answers(vector(shared_data, "test_does_not_drop_if_ongoing_analysis"))
    parsed = parse(text.partition("<|start|>functions")[0], **BOTH)
    assert "We need to use lookup_weather tool." in parsed.reasoning
    assert parsed.calls == (("lookup_weather", '{"location": "San Francisco"}'),)


@pytest.mark.parametrize(
    "name", ["test_preserve_cot", "test_keep_analysis_between_finals"]
)
def test_reasoning_and_answer(shared_data, name):
    text = vector(shared_data, name)
    message = text[text.index("<|channel|>analysis") :].partition("<|start|>user")[0]
    parsed = parse(message, **BOTH)
    expected = {
        "test_preserve_cot": Parsed(
            'User asks a simple question: "What is 2 + 2?" The answer: 4.',
            "2 + 2 equals 4.",
        ),
        "test_keep_analysis_between_finals": Parsed("thinking 3+5", "8"),
    }
    assert parsed == expected[name]


@pytest.mark.parametrize(
    "name", ["test_simple_reasoning_response", "test_simple_tool_call"]
)
def test_token_vectors(shared_data, name):
    """Outputs given as tokens of o200k, decoded by its published vocabulary."""
    tokens = [int(word) for word in vector(shared_data, name).split()]
    text = decode(shared_data / "data" / "tokenizers" / "o200k_base.tiktoken", tokens)
    parsed = parse(text, **BOTH)
    if name == "test_simple_reasoning_response":
        assert parsed.content == "2 + 2 = 4."
        assert parsed.reasoning.startswith("User asks")
    else:
        ((function, arguments),) = parsed.calls
        assert function == "lookup_weather"
        assert json.loads(arguments) == {"location": "Tokyo"}
        assert parsed.reasoning.startswith("User asks")


def decode(file, tokens):
    special = {
        200002: "<|return|>",
        200003: "<|constrain|>",
        200005: "<|channel|>",
        200006: "<|start|>",
        200007: "<|end|>",
        200008: "<|message|>",
        200012: "<|call|>",
    }
    wanted = set(tokens)
    texts = {token: word.encode() for token, word in special.items()}
    for line in file.read_bytes().splitlines():
        word, number = line.split()
        if int(number) in wanted:
            texts[int(number)] = base64.b64decode(word)
    return b"".join(texts[token] for token in tokens).decode("utf-8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|channel|>final<|message|>Yes<|return|>", Parsed(content="Yes")),
        ("<|start|>assistant<|channel|>final<|message|>Yes", Parsed(content="Yes")),
        ("<|channel|>final <|constrain|>json<|message|>{}", Parsed(content="{}")),
        ("<|channel|>commentary<|message|>Plan<|end|>", Parsed(content="Plan")),
        (
            "<|channel|>analysis<|message|>a<|end|><|channel|>analysis<|message|>b<|end|>",
            Parsed(reasoning="a\nb"),
        ),
        # Without the end of a message, or the start of the next one.
        (
            "<|channel|>analysis<|message|>a<|channel|>final<|message|>b",
            Parsed("a", "b"),
        ),
        (
            "<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>b",
            Parsed("a", "b"),
        ),
        (
            "<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}",
            Parsed(calls=(("f", "{}"),)),
        ),
        # Arguments that are no object.
        (
            "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
            Parsed(content="print(1)"),
        ),
        # Cut off within a head.
        ("<|channel|>anal", Parsed()),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assis", Parsed("a")),
        # No head at all.
        ("<|channel|>Hello there", Parsed(content="<|channel|>Hello there")),
        ("Hello<|end|>", Parsed(content="Hello")),
        ("Hi<|start|>assistant<|channel|>final<|message|>b", Parsed(content="Hib")),
    ],
)
def test_messages(text, expected):
    for pieces in ([text], text):
        assert parse(pieces, **BOTH) == expected


def test_prompt_that_ends_within_a_message():
    text = "a<|end|><|start|>assistant<|channel|>final<|message|>b"
    assert parse(text, **BOTH, starts_in_reasoning=True) == Parsed("a", "b")
    assert parse("b<|return|>", **BOTH, starts_in_reasoning=False).content == "b"


def test_calls_are_content_without_a_tool_parser():
    text = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    assert parse(text, reasoning="openai_gptoss").content == "{}"


@pytest.fixture
def reference(shared_data, monkeypatch):
    """openai-harmony's own parser, where it is installed."""
    harmony = pytest.importorskip("openai_harmony")
    folder = shared_data / "data" / "tokenizers"
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
    encoding = harmony.load_harmony_encoding("HarmonyGptOss")
    role = harmony.Role.ASSISTANT

    def read(text):
        tokens = encoding.encode(text, allowed_special="all")
        return encoding.parse_messages_from_completion_tokens(tokens, role)

    return read


END = "<|end|><|start|>assistant"
JSON = "<|constrain|>json<|message|>"
THINKS = f"<|channel|>analysis<|message|>Hm.{END}"
PLANS = f"<|channel|>commentary<|message|>Plan.{END}"
OUTPUTS = [
    f'{THINKS}<|channel|>commentary to=functions.f {JSON}{{"a": 1}}<|call|>',
    f'{THINKS} to=functions.f<|channel|>commentary {JSON}{{"a": [1, "b"]}}<|call|>',
    f"{PLANS}<|channel|>final<|message|>Done <b>&.<|return|>",
    '<|channel|>commentary to=functions.g json<|message|>{"q": "\u00fc"}<|call|>',
    "<|channel|>final<|message|>Only an answer",
]


@pytest.mark.parametrize("text", OUTPUTS)
def test_against_the_reference_implementation(reference, text):
    reasoning, content, calls = [], [], []
    for message in reference(text):
        body = message.content[0].text
        if message.recipient:
            name = message.recipient.removeprefix("functions.")
            calls.append((name, json.loads(body)))
        else:
            (reasoning if message.channel == "analysis" else content).append(body)
    parsed = parse(text, **BOTH)
    assert parsed.reasoning == "\n".join(reasoning)
    assert parsed.content == "\n".join(content)
    assert [(name, json.loads(text)) for name, text in parsed.calls] == calls
