"""The command line on an engine whose tokens are known."""

import importlib.metadata
import io
import json
import os
import signal
import subprocess
import sys

import pytest

from jllm.cli import DEMO_PROMPTS, main
from tests.fakes import FakeEngine


def echo(request, index):
    return bytes(i for i in request.prompt_token_ids if i < 256).decode() + str(index)


@pytest.fixture
def engine(monkeypatch):
    fake = FakeEngine(echo)
    fake.configs = []

    def create(config):
        fake.configs.append(config)
        return fake

    monkeypatch.setattr("jllm.llm.create_engine", create)
    return fake


@pytest.fixture
def type_in(monkeypatch):
    def type_in(*lines):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{x}\n" for x in lines)))

    return type_in


def test_one_prompt_is_streamed(engine, capsys):
    assert (
        main(["generate", "m", "--prompt", "héy", "--seed", "3", "--top-p", "0.5"]) == 0
    )
    assert capsys.readouterr().out == "héy0\n"
    (request,) = engine.added
    sampling = request.params
    assert (sampling.seed, sampling.top_p, sampling.top_k) == (3, 0.5, 7)
    assert sampling.max_tokens is None
    assert engine.configs[0].model == "m"
    assert engine.closed == 1


def test_tokens_and_limits(engine, capsys):
    code = main(["generate", "--prompt-token-ids", "65,66", "--max-tokens", "1"])
    assert (code, capsys.readouterr().out) == (0, "A\n")
    assert engine.configs[0].model is None


def test_several_prompts(engine, capsys):
    arguments = ["--prompt", "a", "--prompt", "b", "--prompt-token-ids", "67"]
    assert main(["generate", *arguments]) == 0
    assert capsys.readouterr().out == "[0] a0\n[1] b0\n[2] C0\n"
    assert main(["generate", "--prompt", "a", "--n", "2"]) == 0
    assert capsys.readouterr().out == "[0.0] a0\n[0.1] a1\n"


def test_json_lines(engine, capsys):
    arguments = ["--prompt", "é", "--prompt", "b", "--json", "--logprobs", "1"]
    assert main(["generate", *arguments]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["outputs"][0]["text"] for line in lines] == ["é0", "b0"]
    assert lines[0]["prompt"] == "é"
    assert lines[0]["finished"]
    assert len(lines[1]["outputs"][0]["logprobs"]) == 3


def test_prompt_from_standard_input(engine, capsys, type_in):
    type_in("one", "two")
    assert main(["generate", "--prompt", "-"]) == 0
    assert capsys.readouterr().out == "one\ntwo0\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "COMMAND"),
        (["unheard"], "unheard"),
        (["generate"], "--prompt"),
        (["generate", "--prompt", "a", "--unheard"], "--unheard"),
        (["generate", "--prompt", "a", "--temperature", "hot"], "--temperature"),
        (["generate", "--prompt", "a", "--temperature", "9"], "temperature=9"),
        (["generate", "--prompt", "a", "--max-model-len", "0"], "max_model_len=0"),
        (["generate", "--prompt-token-ids", "1,x"], "--prompt-token-ids"),
        (["generate", "--prompt-token-ids", "999"], "vocabulary"),
        (["generate", "--prompt", "x" * 200], "max_model_len"),
    ],
)
def test_errors_are_one_line_and_code_2(engine, capsys, arguments, word):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("jllm: error: ")
    assert captured.err.count("\n") == 1
    assert word in captured.err
    assert engine.added == []


def test_missing_model(capsys, tmp_path):
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_failed_request_is_code_1(engine, capsys):
    engine.error_for = "0"
    assert main(["generate", "--prompt", "a"]) == 1


def test_chat_remembers(engine, capsys, type_in):
    engine.answer = "ok"
    type_in("Hi", "", "more", "/reset", "new", "/quit", "never")
    assert main(["chat", "m", "--system", "Be"]) == 0
    assert capsys.readouterr().out == "> ok\n> > ok\n> > ok\n> "
    prompts = [bytes(r.prompt_token_ids[1:]).decode() for r in engine.added]
    assert prompts == [
        "system: Be\nuser: Hi\nassistant:",
        "system: Be\nuser: Hi\nassistant: ok\nuser: more\nassistant:",
        "system: Be\nuser: new\nassistant:",
    ]


def test_chat_ends_with_its_input(engine, capsys, type_in):
    type_in()
    assert main(["chat"]) == 0


def test_interrupt_ends_the_answer_only(engine, capsys, type_in):
    engine.answer = "answer"

    def interrupt(fake):
        if fake.num_steps == 3:
            signal.raise_signal(signal.SIGINT)

    engine.on_step = interrupt
    type_in("Hi", "more")
    assert main(["chat"]) == 0
    assert capsys.readouterr().out == "> an\n> answer\n> \n"
    assert b"assistant: an\n" in bytes(engine.added[1].prompt_token_ids[1:])
    assert engine.aborted == ["0"]


def test_interrupt_of_generate(engine, capsys):
    engine.on_step = lambda fake: signal.raise_signal(signal.SIGINT)
    assert main(["generate", "--prompt", "a"]) == 130
    assert engine.closed == 1


def test_demo(engine, capsys):
    engine.answer = " and so on."
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Once upon a time and so on.\n")
    assert "first token after" in out
    assert all(f"{prompt} and so on." in out for prompt in DEMO_PROMPTS)
    assert "8 prompts in one batch: 96 tokens" in out
    assert len({request.params.seed for request in engine.added[1:]}) == 8


def test_version_and_environment(capsys):
    assert main(["--version"]) == 0
    version = importlib.metadata.version("jllm")
    assert capsys.readouterr().out == f"jllm {version}\n"
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"jllm {version}" in out
    assert "device 0: cpu" in out


def test_reader_that_leaves():
    """`jllm ... | head` ends without a traceback."""
    code = "import sys, jllm.cli; sys.exit(jllm.cli.main(['--version']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 141


def test_module_runs():
    command = [sys.executable, "-m", "jllm", "generate", "--prompt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("jllm: error: ")
