"""The examples of the README run as they stand."""

import contextlib
import pathlib
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
PYTHON = [text for language, text in BLOCK.findall(README) if language == "python"]
CLIENTS = re.findall(r"```python server\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for language, text in BLOCK.findall(README)
    if language == "sh"
    for line in text.splitlines()
    if line.startswith("jllm ")
]


def run(arguments):
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_example(number):
    assert run(["-c", PYTHON[number]]).strip()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    _, *arguments = shlex.split(command)
    assert run(["-m", "jllm", *arguments]).strip()


@pytest.mark.slow
def test_clients_of_the_server():
    command = re.search(r"^jllm (serve --port 8000)$", README, re.MULTILINE)[1]
    server = subprocess.Popen([sys.executable, "-m", "jllm", *command.split()])
    try:
        wait_until_ready("http://127.0.0.1:8000/ready", server)
        for example in CLIENTS:
            assert run(["-c", example]).strip()
    finally:
        server.terminate()
        assert server.wait(60) == 0


def wait_until_ready(url, server):
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.1)
    pytest.fail("the server was not ready")


def test_there_are_examples():
    assert len(PYTHON) >= 4
    assert len(CLIENTS) >= 1
    assert len(COMMANDS) >= 3


def test_tables_are_what_the_results_say():
    run(["-m", "benchmarks.tables", "--check"])
