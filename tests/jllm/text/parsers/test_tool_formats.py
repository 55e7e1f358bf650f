"""Calls in every format: what is read, streamed, given back; in linear time."""

import json
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jllm import ContentDelta, ToolCallDelta, make_output_parser
from jllm.errors import ConfigError
from jllm.text.parsers.reader import Reader
from jllm.text.parsers.registry import REASONING_FORMATS, TOOL_FORMATS
from tests.jllm.text.parsers.outputs import (
    ARGUMENTS,
    CASES,
    TOOLS,
    Parsed,
    cut,
    parse,
)

IDS = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
NAMES = sorted(TOOL_FORMATS)
CUTS = st.lists(st.integers(0, 10_000), max_size=12)
WORDS = ["{", "}", "[", "]", '"', "'", ",", ":", "(", ")", "=", "\\", "\n", " ", "é"]
WORDS += ["weather", "name", '"name"', '"arguments"', '"parameters": {', "1", "null"]
WORDS += ['{"name": "weather", "arguments": {"city": "x', "functions.weather:0", "to="]


def fragments(name):
    """Pieces of which the outputs of a format are made, whole and broken."""
    markers = sorted(TOOL_FORMATS[name].markers)
    outputs = [text for other, text in CASES if other == name]
    halves = [half for text in outputs for half in (text[:40], text[40:90])]
    return st.sampled_from([*markers, *markers, *WORDS, *halves])


@pytest.mark.parametrize(("name", "text"), CASES, ids=IDS)
@pytest.mark.parametrize("streams", [True, False])
def test_calls_are_read(name, text, streams):
    for pieces in ([text], list(text)):
        parsed = parse(pieces, name, stream_arguments=streams)
        assert parsed.content == ""
        assert [call for call, _ in parsed.calls] == ["weather", "weather"]
        for _, arguments in parsed.calls:
            assert json.loads(arguments) == ARGUMENTS


@pytest.mark.parametrize(("name", "text"), CASES, ids=IDS)
def test_arguments_stream(name, text):
    """A client sees the arguments grow, not only whole calls."""
    parser = make_output_parser(reasoning=None, tools=name, tool_schemas=TOOLS)
    deltas = [d for piece in text for d in parser.push(piece)]
    assert len([d for d in deltas if isinstance(d, ToolCallDelta)]) > 20
    heads = [d for d in deltas if isinstance(d, ToolCallDelta) and d.id is not None]
    assert len({d.id for d in heads}) == (1 if "abcdefghi" in text else 2) or (
        name == "kimi_k2"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_format_has_a_case(name):
    assert name in {case for case, _ in CASES}


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_result_does_not_depend_on_the_cuts(name, streams):
    @settings(max_examples=25)
    @given(parts=st.lists(fragments(name), max_size=14), places=CUTS)
    def run(parts, places):
        text = "".join(parts)
        whole = parse([text], name, stream_arguments=streams)
        assert parse(cut(text, places), name, stream_arguments=streams) == whole
        assert parse(text, name, stream_arguments=streams) == whole
        if not streams:
            assert all(isinstance(json.loads(a), dict) for _, a in whole.calls)

    run()


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"openai"}))
def test_nothing_is_lost(name):
    """Where no call is found, the whole text comes back."""

    @settings(max_examples=25)
    @given(parts=st.lists(fragments(name), max_size=14))
    def run(parts):
        text = "".join(parts)
        parsed = parse([text], name, stream_arguments=False)
        if not parsed.calls:
            assert parsed.content == text

    run()


@pytest.mark.parametrize(("name", "text"), CASES, ids=IDS)
def test_content_around_calls_is_kept(name, text):
    if name in ("openai", "llama3_json", "pythonic"):
        pytest.skip("the format has no content before calls, or marks it")
    if name in ("llama4_json", "llama4_pythonic") or text.startswith("<function"):
        pytest.skip("without its tag the format stands at the start")
    parsed = parse(f"  One moment.\n\n{text}\n Done.\n", name)
    assert len(parsed.calls) == 2
    assert parsed.content == "  One moment.Done.\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "no"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f" "arguments": {}}</tool_call>'),
        ("hermes", "<tool_call>I would call f now.</tool_call>"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "\\ud800"}</tool_call>'),
        ("llama3_json", '{"name": "Bob", "age": 5}'),
        ("llama3_json", '{"answer": 5}'),
        ("llama3_json", "{not json}"),
        ("pythonic", "[1] is the first source."),
        ("pythonic", "[f](http://x) is a link"),
        ("pythonic", "[f(1)]"),
        ("pythonic", "[1, 2, 3]"),
        ("mistral", "[TOOL_CALLS] nothing"),
        ("mistral", "[TOOL_CALLS][]"),
        ("glm45", "<tool_call>f\n<arg_value>1</arg_value></tool_call>"),
        ("qwen3_coder", "<tool_call>\n{}\n</tool_call>"),
        ("deepseek_v31", "<\uff5ctool▁calls▁begin\uff5c>f"),
        ("openai", "Hello there"),
    ],
)
def test_what_is_no_call_is_content(name, text):
    for streams in (True, False):
        assert parse(text, name, stream_arguments=streams) == Parsed(content=text)


def test_call_that_breaks_within_its_arguments():
    text = '<tool_call>{"name": "f", "arguments": {"a": 1, oops}}</tool_call> end'
    assert parse(text, "hermes", stream_arguments=False) == Parsed(content=text)
    # What has been streamed cannot be taken back; the rest is not lost.
    streamed = Parsed(content="oops}}</tool_call> end", calls=(("f", '{"a": 1, '),))
    assert parse(text, "hermes") == streamed


def test_call_that_is_cut_off():
    text = '<tool_call>{"name": "f", "arguments": {"a": "bc'
    assert parse(text, "hermes", stream_arguments=False) == Parsed(content=text)
    assert parse(text, "hermes") == Parsed(calls=(("f", '{"a": "bc'),))


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": {}}',
        '<tool_call>{"name": "f", "arguments": {}',
        '<tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": null}</tool_call>',
        '<tool_call>{"type": [1, {}], "name": "f", "id": 7, "arguments": {}, "x": 1}',
    ],
)
def test_small_faults_are_forgiven(text):
    assert parse(text, "hermes").calls == (("f", "{}"),)


def test_later_calls_survive_a_malformed_one():
    good = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    parsed = parse(f"{good}\n<tool_call>bad</tool_call>\n{good}", "hermes")
    assert parsed.calls == (("f", "{}"), ("f", "{}"))
    assert parsed.content == "<tool_call>bad</tool_call>"


def test_types_by_schema():
    """The same text is a string or not, as the parameter's schema says."""
    text = "<tool_call>weather" + "".join(
        f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>"
        for key, value in [
            ("city", "12"),
            ("days", "12"),
            ("flags", "['x', None]"),
            ("note", "12"),
            ("unheard", "True"),
            ("other", "a b"),
        ]
    )
    ((_, arguments),) = parse(text + "</tool_call>", "glm45").calls
    assert json.loads(arguments) == {
        "city": "12",
        "days": 12,
        "flags": ["x", None],
        "note": "12",
        "unheard": True,
        "other": "a b",
    }


def test_ids_of_mistral():
    parser = make_output_parser(reasoning=None, tools="mistral")
    deltas = parser.push("[TOOL_CALLS]f{}[TOOL_CALLS]g[CALL_ID]abcdefgh9[ARGS]{}")
    first, second = [d.id for d in deltas if isinstance(d, ToolCallDelta)]
    assert len(first) == 9
    assert first.isalnum()
    assert second == "abcdefgh9"


def test_special_tokens():
    tokens = ["<|im_start|>", "<|im_end|>", "<tool_call>"]
    options = {"reasoning": None, "tools": "hermes"}
    parser = make_output_parser(**options, special_tokens=tokens)
    assert parser.needs_special_tokens
    assert parser.push("a<|im_end|>b<|im") == (ContentDelta("ab"),)
    assert parser.finish() == (ContentDelta("<|im"),)
    assert not make_output_parser(
        **options, special_tokens=tokens[:2]
    ).needs_special_tokens
    assert make_output_parser(**options).needs_special_tokens
    assert not make_output_parser(reasoning=None, tools=None).needs_special_tokens
    # One that is split into several tokens, of which one is special.
    dsml = make_output_parser(
        reasoning=None, tools="deepseek_v32", special_tokens=["\uff5cDSML\uff5c"]
    )
    assert dsml.needs_special_tokens


def test_without_parsers_all_is_content():
    text = '  <think>x</think><tool_call>{"name": "f"}</tool_call>\n'
    assert parse(text) == Parsed(content=text)


def test_unknown_names():
    with pytest.raises(ConfigError, match=r"tool_call_parser='x'.*hermes"):
        make_output_parser(reasoning=None, tools="x")
    with pytest.raises(ConfigError, match=r"reasoning_parser='x'.*qwen3"):
        make_output_parser(reasoning="x", tools=None)
    with pytest.raises(ConfigError, match="go with each other"):
        make_output_parser(reasoning="qwen3", tools="openai")


@pytest.mark.parametrize("name", NAMES)
def test_markers_are_told_apart(name):
    """`Reader.piece` needs markers none of which is within another."""
    openers = TOOL_FORMATS[name].openers
    for reasoning in REASONING_FORMATS.values():
        markers = openers | reasoning.markers
        assert not [(a, b) for a in markers for b in markers if a != b and a in b]


# --- linear time -------------------------------------------------------------------


def num_events(run):
    """Counts the calls that Python makes, which needs no clock."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += 1

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def hostile(name, length):
    """Outputs that make parsers which look back quadratic."""
    opener = min(TOOL_FORMATS[name].openers, default="<|channel|>")
    head = next(text for case, text in CASES if case == name)[:60]
    for start in ("", opener, head):
        for part in (opener, opener[:-1], "[f(a=", '{"name": "', '\\"', " "):
            yield start + part * (length // len(part))


@pytest.mark.parametrize("name", NAMES)
def test_work_grows_with_the_text(name):
    def work(length):
        texts = hostile(name, length)
        return [
            num_events(lambda t=text: parse(cut(t, range(0, length, 5)), name))
            for text in texts
        ]

    # Longer than any head of a message.
    for one, two in zip(work(1200), work(2400), strict=True):
        # A parser that looks back would do four times the work.
        assert two < 2.5 * one + 200


@pytest.mark.parametrize("name", NAMES)
def test_characters_examined(name, monkeypatch):
    """Each piece is joined to a few characters that wait, however long the text."""
    handled = 0
    feed = Reader.feed

    def counting(self, text):
        nonlocal handled
        handled += self.num_held + len(text)
        feed(self, text)

    monkeypatch.setattr(Reader, "feed", counting)
    length = 1000
    longest = max(map(len, TOOL_FORMATS[name].markers))
    for text in hostile(name, length):
        handled = 0
        parse(list(text), name)
        assert handled <= (longest + 1) * (length + 100)


@pytest.mark.parametrize("name", ["hermes", "pythonic", "glm45", "openai", "mistral"])
def test_a_megabyte(name):
    opener = min(TOOL_FORMATS[name].openers, default="<|channel|>")
    for part in (opener, "[f(a=", '{"name": "\\"'):
        text = opener + part * (1_000_000 // len(part))
        parsed = parse([text], name, stream_arguments=False)
        assert len(parsed.content) > 900_000 or name == "openai"
