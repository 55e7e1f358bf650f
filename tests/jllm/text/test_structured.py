"""Constraints compiled for the embedded tokenizer: what they take, refuse, and cost."""

import asyncio
import json
import pathlib
import threading
import time

import pytest

import jllm
from jllm import InvalidRequestError, StructuredOutputsParams
from jllm.text import structured
from jllm.text.structured import GrammarCompiler, compile_grammar, make_vocabulary
from jllm.text.tokenizer import load_tokenizer

FOLDER = pathlib.Path(jllm.__file__).parent / "default_model"
SECONDS = 5


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return make_vocabulary(tokenizer)


@pytest.fixture(scope="module")
def takes(vocabulary):
    """Whether a whole text is in the grammar of a constraint."""

    def takes(text, **fields):
        matcher = compile_grammar(StructuredOutputsParams(**fields), vocabulary).copy()
        ids = vocabulary.tokens.tokenize_str(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return takes


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
LEGACY_TAG = {
    "structures": [
        {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"enum": ["x"]}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}
INTEGER = {"type": "json_schema", "json_schema": {"type": "integer"}}
TEXT = {"type": "any_text"}


def tag(begin, content, end):
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def form(**fields):
    return {"structural_tag": {"type": "structural_tag", "format": fields}}


SEQUENCE = form(
    type="sequence",
    elements=[
        tag("<think>", TEXT, ["</think>", "</t>"]),
        {"type": "const_string", "value": '"\\n'},
        {"type": "regex", "pattern": "a/b|c"},
        {"type": "grammar", "grammar": 'start: "d" | "e"'},
    ],
)
CALLS = [tag("[", INTEGER, "]")]


@pytest.mark.parametrize(
    ("fields", "inside", "outside"),
    [
        ({"json": PERSON}, ['{"name":"é\\n","age":-3}'], ['{"name":"a"}', "{}", "3"]),
        ({"json": PERSON}, ['{ "name":"a",\n "age": 3}'], ["{" + " " * 40]),
        (
            {"json": PERSON, "disable_any_whitespace": True},
            ['{"name":"a","age":3}'],
            ['{"name":"a", "age":3}'],
        ),
        (
            {"json": PERSON, "whitespace_pattern": " "},
            ['{ "name":"a","age": 3}'],
            ['{\n"name":"a","age":3}', '{  "name":"a","age":3}'],
        ),
        (
            {"json": PERSON, "disable_additional_properties": True},
            ['{"name":"a","age":3}'],
            ['{"name":"a","age":3,"x":1}'],
        ),
        ({"json": True}, ["3", '"a"', "[{}]"], ["a"]),
        ({"json": {"format": "date"}}, ['"2024-02-29"', "7"], ['"2023-02-29"', '"a"']),
        ({"json": {"const": {"format": "date"}}}, ['{"format":"date"}'], ["{}"]),
        ({"json_object": True}, ["{}", '{"a":[1,{}]}'], ["[]", "1"]),
        ({"regex": "^[0-9]{3}-(a|é)$"}, ["012-é", "999-a"], ["01-a", "012-b", "1"]),
        ({"regex": r"a|b\$"}, ["a", "b$"], ["b", "ab$"]),
        (
            {"choice": ['say "yes"\n', "no\\", "né 😀"]},
            ['say "yes"\n', "no\\", "né 😀"],
            ["no", "x"],
        ),
        ({"grammar": 'start: "a" b*\nb: "b" | "c"'}, ["a", "abcb"], ["b", "ad"]),
        ({"grammar": 'root ::= "x" ("y" | [0-9])+'}, ["xy", "x7y"], ["x", "y"]),
        (
            {"structural_tag": LEGACY_TAG},
            ["free < text", 'a<f=a>3</f>b<f=b>"x"</f>', ""],
            ["a<f=c>3</f>", "<f=a>x</f>", "<f=a>3"],
        ),
        (
            SEQUENCE,
            ['<think>x < y</think>"\\na/bd', '<think></t>"\\nce'],
            ['x</think>"\\ncd', '<think></t>"\\nab'],
        ),
        (
            form(type="tags_with_separator", tags=CALLS, separator=", "),
            ["", "[1]", "[1], [-2]"],
            ["[1],[2]", "[1], ", "[a]"],
        ),
        (
            form(
                type="tags_with_separator",
                tags=CALLS,
                separator=",",
                at_least_one=True,
                stop_after_first=True,
            ),
            ["[1]"],
            ["", "[1],[2]"],
        ),
        (
            form(type="triggered_tags", triggers=["["], tags=CALLS, at_least_one=True),
            ["[1]", "a[1]b[2]c"],
            ["", "a", "[x]"],
        ),
        (
            form(
                type="triggered_tags", triggers=["["], tags=CALLS, stop_after_first=True
            ),
            ["[1]", "a[1]", "a"],
            ["[1]b", "[x]"],
        ),
        (form(type="or", elements=[INTEGER, *CALLS]), ["7", "[7]"], ["[", "a"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_takes_what_the_constraint_describes(takes, fields, inside, outside):
    assert [text for text in inside if not takes(text, **fields)] == []
    assert [text for text in outside if takes(text, **fields)] == []


def test_special_tokens_are_tokens_not_text(tokenizer, vocabulary):
    name, token = next(iter(vocabulary.special_tokens.items()))
    part = form(type="sequence", elements=[tag("a" + name, INTEGER, name + "b")])
    constraint = StructuredOutputsParams(**part)
    matcher = compile_grammar(constraint, vocabulary).copy()
    encode = vocabulary.tokens.tokenize_str
    ids = [*encode("a"), token, *encode("7"), token, *encode("b")]
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()
    assert tokenizer.added_tokens[token] == name


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"json": {"dependentSchemas": {}}}, ["json", "dependentSchemas"]),
        ({"json": {"type": "array", "uniqueItems": True}}, ["json", "uniqueItems"]),
        ({"json": {"type": "objekt"}}, ["json", "objekt"]),
        ({"json": {"format": "nonsense"}}, ["json", "nonsense"]),
        ({"json": {"dependentSchemas": {}, "x-guidance": {"lenient": True}}}, ["json"]),
        ({"json": {"oneOf": [{"minLength": 1}, {"maxLength": 2}]}}, ["oneOf"]),
        ({"json": {"$ref": "https://example.com/a"}}, ["json"]),
        ({"json": {"$ref": "#"}}, ["json allows no output"]),
        ({"json": False}, ["json", "false"]),
        ({"regex": "(?=a)b"}, ["regex", "look-ahead"]),
        ({"regex": "(a"}, ["regex"]),
        ({"grammar": "start: ("}, ["grammar"]),
        ({"grammar": "root ::= (("}, ["grammar", "Expected"]),
        (form(type="qwen_xml_parameter"), ["structural_tag", "qwen_xml_parameter"]),
        (form(type="tag", begin="a"), ["structural_tag", "lacks 'content'"]),
        (form(type="or", elements=[]), ["structural_tag", "elements"]),
        (
            form(type="triggered_tags", triggers=["x"], tags=CALLS),
            ["structural_tag", "no trigger"],
        ),
        ({"structural_tag": {"type": "structural_tag"}}, ["lacks 'format'"]),
    ],
    ids=lambda value: "",
)
def test_refused_by_field_and_reason(vocabulary, fields, words):
    with pytest.raises(InvalidRequestError) as error:
        compile_grammar(StructuredOutputsParams(**fields), vocabulary)
    assert error.value.parameter == "structured_outputs"
    assert [word for word in words if word not in str(error.value)] == []
    assert len(str(error.value)) < 400


def doubling(combine, depth):
    rules = {f"d{i}": combine({"$ref": f"#/$defs/d{i + 1}"}) for i in range(depth)}
    return {"$defs": rules | {f"d{depth}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def objects(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}}
    return schema


BOMBS = {
    "wide and deep": {"json": objects(11)},
    "enum": {"json": {"enum": [f"{i * 7919}" * 3 for i in range(9000)]}},
    "choices": {"choice": [f"{i * 7919} {i}" for i in range(10_000)]},
    "multiples": {"json": {"type": "integer", "multipleOf": 99_991}},
    "regex": {"regex": "(.*a.{30}){30}"},
    "repeated": {"regex": "((a{0,1000}){0,1000}){0,1000}"},
    "brackets": {"regex": "(" * 20_000 + "a" + ")" * 20_000},
    "doubled terminal": {
        "grammar": "start: A0\nA26: /x/\n"
        + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(26))
    },
    "doubled rule": {
        "grammar": 'start: a0\na40: "x"\n'
        + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(40))
    },
    "GBNF brackets": {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000},
    "both": {"json": doubling(lambda d: {"allOf": [d, d]}, 40)},
    "either": {"json": doubling(lambda d: {"anyOf": [d, {"items": d}]}, 200)},
    "patterns": {"json": {"allOf": [{"pattern": f"{c}.{{12}}x"} for c in "abcdefgh"]}},
    "intersections": {
        "json": {
            "allOf": [
                {"anyOf": [{"minLength": i}, {"pattern": "a" * i}]} for i in range(18)
            ]
        }
    },
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_in_time(vocabulary, name):
    """By processor time, which other processes do not lengthen."""
    began = time.thread_time()
    try:
        grammar = compile_grammar(StructuredOutputsParams(**BOMBS[name]), vocabulary)
    except InvalidRequestError as error:
        assert len(str(error)) < 400  # noqa: PT017
    else:
        matcher = grammar.copy()
        for token in vocabulary.tokens.tokenize_str("aaaa"):
            matcher.consume_token(token)
            matcher.compute_bitmask()
            if matcher.is_error():
                break
    assert time.thread_time() - began < SECONDS


def test_equal_constraints_are_compiled_once(tokenizer, monkeypatch):
    compiled = []

    def compile_(constraint, vocabulary):
        compiled.append(constraint)
        return compile_grammar(constraint, vocabulary)

    monkeypatch.setattr(structured, "compile_grammar", compile_)
    compiler = GrammarCompiler(tokenizer)
    first = compiler.compile(StructuredOutputsParams(json=PERSON))
    again = compiler.compile(StructuredOutputsParams(json=json.dumps(PERSON)))
    assert again is first
    assert len(compiled) == 1
    bad = StructuredOutputsParams(regex="(")
    for _ in range(2):
        with pytest.raises(InvalidRequestError):
            compiler.compile(bad)
    assert compiled[1:] == [bad, bad]


def test_the_cache_is_bounded_in_bytes(tokenizer):
    bound = 5 * structured.GRAMMAR_BYTES
    compiler = GrammarCompiler(tokenizer, cache_bytes=bound)
    grammars = []
    for i in range(30):
        constraint = StructuredOutputsParams(json={"const": i})
        grammars.append(compiler.compile(constraint))
        assert compiler.num_bytes <= bound
    assert compiler.compile(constraint) is grammars[-1]
    first = compiler.compile(StructuredOutputsParams(json={"const": 0}))
    assert first is not grammars[0]


def test_a_slow_compile_is_refused_in_time(tokenizer, monkeypatch):
    go_on = threading.Event()

    def slow(constraint, vocabulary):
        assert go_on.wait(60)
        return compile_grammar(constraint, vocabulary)

    monkeypatch.setattr(structured, "compile_grammar", slow)
    compiler = GrammarCompiler(tokenizer, seconds=0.05)
    constraint = StructuredOutputsParams(regex="a")
    words = r"structured_outputs.regex was not compiled within 0.05 s"
    with pytest.raises(InvalidRequestError, match=words):
        compiler.compile(constraint)
    with pytest.raises(InvalidRequestError, match=words):
        asyncio.run(compiler.compile_async(constraint))
    go_on.set()


def test_compiles_that_have_not_begun_are_given_up(tokenizer, monkeypatch):
    go_on, begun = threading.Event(), []

    def slow(constraint, vocabulary):
        begun.append(constraint.regex)
        assert go_on.wait(60)
        return compile_grammar(constraint, vocabulary)

    monkeypatch.setattr(structured, "compile_grammar", slow)
    compiler = GrammarCompiler(tokenizer, seconds=0.05)
    names = ["a", "b", *map(str, range(100))]
    for regex in names:
        with pytest.raises(InvalidRequestError, match="was not compiled within"):
            compiler.compile(StructuredOutputsParams(regex=regex))
    assert len(compiler._compiling) == structured.COMPILE_THREADS
    go_on.set()
    compiler._pool.shutdown(wait=True)
    assert begun == names[: structured.COMPILE_THREADS]


def test_the_event_loop_goes_on_and_errors_arrive(tokenizer, monkeypatch):
    go_on = threading.Event()

    def slow(constraint, vocabulary):
        assert go_on.wait(60)
        return compile_grammar(constraint, vocabulary)

    monkeypatch.setattr(structured, "compile_grammar", slow)
    compiler = GrammarCompiler(tokenizer, seconds=60)

    async def main():
        good = asyncio.ensure_future(
            compiler.compile_async(StructuredOutputsParams(regex="a"))
        )
        bad = asyncio.ensure_future(
            compiler.compile_async(StructuredOutputsParams(regex="("))
        )
        left = asyncio.ensure_future(
            compiler.compile_async(StructuredOutputsParams(regex="a"))
        )
        for _ in range(5):
            await asyncio.sleep(0)
        left.cancel()
        go_on.set()
        with pytest.raises(InvalidRequestError):
            await bad
        assert (await good).num_bytes > 0

    asyncio.run(main())
