"""The examples of the README run as they stand."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
PYTHON = [text for language, text in BLOCK.findall(README) if language == "python"]
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


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_example(number):
    assert run(["-c", PYTHON[number]]).strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    _, *arguments = shlex.split(command)
    assert run(["-m", "jllm", *arguments]).strip()


def test_there_are_examples():
    assert len(PYTHON) >= 4
    assert len(COMMANDS) >= 3


def test_tables_are_what_the_results_say():
    run(["-m", "benchmarks.tables", "--check"])
