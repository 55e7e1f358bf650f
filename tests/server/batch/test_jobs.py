"""Batch jobs: lines mean what requests to the server mean."""

import argparse
import json
import signal
import subprocess
import sys
import time

import pytest

from jllm import ConfigError, EngineConfig, cli
from server.batch.command import BATCH
from server.batch.options import BatchOptions
from tests.fakes import FakeEngine
from tests.server.batch.fakes import MODEL, echo, run

CHAT, COMPLETIONS, EMBEDDINGS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
)
MESSAGES = [{"role": "user", "content": "hi"}]
GOOD = (
    (CHAT, {"messages": MESSAGES, "max_tokens": 9, "logprobs": True}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 9, "n": 2, "model": MODEL}),
    (COMPLETIONS, {"prompt": [[97, 98], [100]], "max_tokens": 9, "echo": True}),
    (COMPLETIONS, {"prompt": "abc", "logprobs": 1, "stop": "b"}),
    (EMBEDDINGS, {"input": ["abc", "de"]}),
    (EMBEDDINGS, {"input": "abc", "encoding_format": "base64"}),
)
BAD = (
    (CHAT, {"messages": MESSAGES, "temperature": 3}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": MESSAGES, "top_logprobs": 2}),
    (CHAT, {"messages": MESSAGES, "model": "another"}),
    (COMPLETIONS, {"prompt": "x" * 200}),
    (COMPLETIONS, {"prompt": "abc", "best_of": 3}),
    (EMBEDDINGS, {"input": []}),
)


def write(path, requests):
    lines = [
        {"custom_id": f"c{i}", "method": "POST", "url": url, "body": body}
        for i, (url, body) in enumerate(requests)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(path)]


def rows(folder, name="output"):
    *complete, rest = (folder / f"{name}.jsonl").read_text().split("\n")
    assert rest == ""
    return [json.loads(row) for row in complete]


def plain(body):
    """An answer without what differs from one time to the next."""
    varying = ("id", "created", "system_fingerprint")
    return {name: value for name, value in body.items() if name not in varying}


def test_lines_are_answered_as_the_server_answers(serve, tmp_path):
    requests = GOOD + BAD
    inputs, output = write(tmp_path / "in.jsonl", requests), tmp_path / "out"
    assert run(FakeEngine(echo), inputs=inputs, output=str(output)) == 0
    found = {row["custom_id"]: row for row in rows(output) + rows(output, "errors")}
    assert len(rows(output)) == len(GOOD)

    async def body(running):
        for i, (url, fields) in enumerate(requests):
            status, _, answer = await running.post(url, fields)
            row = found[f"c{i}"]
            assert row["error"] is None
            assert row["response"]["status_code"] == status
            assert (status == 200) == (i < len(GOOD))
            assert plain(row["response"]["body"]) == plain(answer), fields

    serve(body, echo, default_model=True)


def test_ids_are_the_same_every_time(tmp_path):
    inputs = write(tmp_path / "in.jsonl", GOOD)
    ids = []
    for name in "ab":
        run(FakeEngine(echo), inputs=inputs, output=str(tmp_path / name))
        found = rows(tmp_path / name)
        ids.append([(row["id"], row["response"]["body"]["id"]) for row in found])
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == len(GOOD)


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("{torn", "invalid_line", "line 1: the line is no JSON"),
        (
            {"custom_id": "a", "method": "POST", "url": "/v1/none", "body": {}},
            "invalid_url",
            "url must be one of /v1/chat",
        ),
    ],
)
def test_lines_that_are_no_requests_are_errors(tmp_path, line, code, message):
    path = tmp_path / "in.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps(line))
    assert run(FakeEngine(), inputs=[str(path)], output=str(tmp_path / "out")) == 0
    (row,) = rows(tmp_path / "out", "errors")
    assert row["response"] is None
    assert row["error"]["code"] == code
    assert message in row["error"]["message"]
    assert rows(tmp_path / "out") == []


def test_a_batch_does_not_stream(tmp_path):
    requests = [(COMPLETIONS, {"prompt": "a", "stream": True})]
    inputs = write(tmp_path / "in.jsonl", requests)
    run(FakeEngine(), inputs=inputs, output=str(tmp_path / "out"))
    (row,) = rows(tmp_path / "out", "errors")
    assert row["response"]["status_code"] == 400
    assert row["response"]["body"]["error"]["param"] == "stream"


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, EMBEDDINGS])
def test_plain_prompts_are_for_one_api(tmp_path, endpoint):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    (tmp_path / "q.jsonl").write_text('{"prompt": "three", "custom_id": "q"}\n')
    inputs = [str(tmp_path / "p.txt"), str(tmp_path / "q.jsonl")]
    output = tmp_path / "out"
    body = {} if endpoint == EMBEDDINGS else {"max_tokens": 3}
    code = run(
        FakeEngine(echo),
        inputs=inputs,
        output=str(output),
        endpoint=endpoint,
        body=body,
    )
    assert code == 0
    found = rows(output)
    assert [row["custom_id"] for row in found] == ["p.txt:1", "p.txt:2", "q"]
    if endpoint == COMPLETIONS:
        texts = [row["response"]["body"]["choices"][0]["text"] for row in found]
        assert texts == ["eno", "owt", "eer"]


def test_a_dead_engine_ends_the_job_which_goes_on_later(tmp_path, caplog):
    prompts = [(COMPLETIONS, {"prompt": f"p{i}", "max_tokens": 9}) for i in range(40)]
    inputs = write(tmp_path / "in.jsonl", prompts)
    job = {"inputs": inputs, "output": str(tmp_path / "out"), "max_in_flight": 4}
    assert run(FakeEngine(echo, fail_at=20), **job) == 1
    assert "the same command goes on" in caplog.text
    engine = FakeEngine(echo)
    assert run(engine, **job) == 0
    assert 0 < len(engine.added) < 40
    assert len(rows(tmp_path / "out")) == 40


@pytest.mark.slow
def test_sigterm_flushes_and_ends_with_its_code(tmp_path):
    prompts = [(COMPLETIONS, {"prompt": f"p{i}", "max_tokens": 9}) for i in range(200)]
    inputs = write(tmp_path / "in.jsonl", prompts)
    job = {"inputs": inputs, "output": str(tmp_path / "out"), "max_in_flight": 4}
    fields = job | {"step_seconds": 0.002, "grace_seconds": 1, "flush_seconds": 60.0}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.batch.fakes", json.dumps(fields)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(30):
        assert process.stdout.readline() == "step\n"
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 75, errors
    assert time.monotonic() - began < 20
    engine = FakeEngine(echo)
    assert run(engine, **job) == 0
    # Nothing was written before the signal; at least what had ended by then was, then.
    assert len(engine.added) < 200
    assert run(FakeEngine(echo), inputs=inputs, output=str(tmp_path / "whole")) == 0
    texts = [
        [row["response"]["body"]["choices"] for row in rows(tmp_path / name)]
        for name in ("out", "whole")
    ]
    assert texts[0] == texts[1]


def test_the_command_reads_its_flags():
    given = []

    class Noting:
        summary, options = BATCH.summary, BATCH.options

        def run(self, engine, options):
            given.append((engine, options))
            return 0

    parser = argparse.ArgumentParser()
    cli._add_plugin(parser.add_subparsers(), "batch", Noting())
    words = (
        "batch a.jsonl b.txt --output gs://x/y --model m --max-num-seqs 4 --shared "
        '--body {"max_tokens":3} --price-per-hour 1.5'
    )
    arguments = parser.parse_args(words.split())
    assert arguments.run(arguments) == 0
    ((engine, options),) = given
    assert engine == EngineConfig(model="m", max_num_seqs=4)
    assert options == BatchOptions(
        inputs=["a.jsonl", "b.txt"],
        output="gs://x/y",
        body={"max_tokens": 3},
        shared=True,
        price_per_hour=1.5,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": ()}, "inputs must name"),
        ({"output": None}, "give --output"),
        ({"endpoint": "/v1/none"}, "endpoint='/v1/none' must be one of"),
        ({"range_lines": 0}, "range_lines=0 must be an integer, at least 1"),
        ({"lease_seconds": 0.1}, "lease_seconds=0.1 must be between 1 and 86400"),
        ({"grace_seconds": 11}, "grace_seconds=11 must be between 0 and 10"),
        ({"worker_id": "a/b"}, "worker_id='a/b' must be of letters"),
        ({"num_replicas": 2}, "need ray"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        BatchOptions(**{"inputs": ["a"], "output": "b"} | options)
