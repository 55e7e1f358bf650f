"""Inputs: which files, which lines, and what a line asks for."""

import json

import pytest

from jllm.batch.inputs import (
    InputFile,
    find_inputs,
    index_inputs,
    parse_line,
    read_lines,
)
from jllm.errors import ConfigError
from tests.jllm.batch.jobs import request

FILE = InputFile("in.jsonl", "0" * 64, 0)
TEXT = InputFile("in.txt", "0" * 64, 0)


def parse(value, file=FILE, number=3):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_line(raw, file, number)


def test_requests_and_prompts_are_read():
    line = parse(request(5))
    assert (line.custom_id, line.url) == ("id-5", "/v1/completions")
    assert line.body == {"prompt": "prompt 5"}
    assert line.problem is None
    prompt = parse({"prompt": "hello"})
    assert (prompt.body, prompt.url, prompt.custom_id) == ("hello", None, "in.jsonl:3")
    assert parse({"prompt": "x", "custom_id": "mine"}).custom_id == "mine"
    text = parse(b'{"prompt": "as it stands"}\r', TEXT)
    assert text.body == '{"prompt": "as it stands"}'


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (b"{torn", "no JSON"),
        (b"\xff{}", "no JSON in UTF-8"),
        (b"[" * 100_000, "no JSON"),
        ([1], "must be a JSON object"),
        ("text", "must be a JSON object"),
        (request(1) | {"method": "GET"}, "method must be POST"),
        (request(1) | {"body": "x"}, "body must be a JSON object"),
        (request(1) | {"url": 3}, "url must be a string"),
        (request(1) | {"custom_id": ""}, "custom_id must not be empty"),
        (request(1) | {"custom_id": 7}, "custom_id must be a string"),
        (request(1) | {"extra": 7}, "unknown field 'extra'"),
        ({"custom_id": "a", "method": "POST", "url": "/x"}, "missing field body"),
        ({"prompt": 3}, "prompt must be a string"),
        ({"prompt": "x", "max_tokens": 3}, "unknown field 'max_tokens'"),
    ],
)
def test_bad_lines_say_why(value, problem):
    line = parse(value)
    assert problem in line.problem
    assert line.body is None


def test_bad_text_says_why():
    assert "no text in UTF-8" in parse(b"\xff", TEXT).problem


def test_keys_tell_equal_lines_apart():
    line = parse(request(1))
    assert line.key == parse(request(1)).key
    assert line.key != parse(request(1), number=4).key
    assert line.key != parse(request(1), InputFile("in.jsonl", "1" * 64, 0)).key
    assert line.key != parse(request(1) | {"custom_id": "other"}).key


def test_ranges_cover_every_line_once(tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes(b"a\n\nb\nc\r\n\n\n\nd\ne")
    (file,), ranges = index_inputs([str(path)], 2)
    lines = [line for part in ranges for line in read_lines(file, part)]
    assert [(line.number, line.body) for line in lines] == [
        (1, "a"),
        (3, "b"),
        (4, "c"),
        (8, "d"),
        (9, "e"),
    ]
    assert [part.num_requests for part in ranges] == [1, 2, 1, 1]
    assert file.size == path.stat().st_size


def test_patterns_find_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text("x\n")
    found = find_inputs([f"{tmp_path}/*.jsonl", f"{tmp_path}/c.txt"])
    assert [path.rpartition("/")[2] for path in found] == [
        "a.jsonl",
        "b.jsonl",
        "c.txt",
    ]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["{}/none.jsonl"], "is no file"),
        (["{}/*.none"], "matches no file"),
        (["{}"], "is no file"),
        (["{}/a.jsonl", "{}/a.jsonl"], "given twice"),
        (["{}/a.jsonl.gz"], "is compressed"),
        (["nothing://x"], "Protocol not known"),
    ],
)
def test_missing_inputs_are_named(tmp_path, patterns, message):
    (tmp_path / "a.jsonl").write_text("x\n")
    (tmp_path / "a.jsonl.gz").write_text("x\n")
    with pytest.raises(ConfigError, match=message):
        find_inputs([pattern.format(tmp_path) for pattern in patterns])
