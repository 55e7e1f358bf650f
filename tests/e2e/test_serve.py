"""`jllm serve` with the embedded model, asked by OpenAI's client."""

import contextlib
import re
import signal
import subprocess
import sys

import openai
import pytest

MESSAGES = [{"role": "user", "content": "Tell me a story about a cat."}]


@pytest.fixture(scope="module")
def url():
    command = (sys.executable, "-m", "jllm", "serve", "--port", "0")
    child = subprocess.Popen(
        (*command, "--max-num-seqs", "4", "--no-compile-ahead"),
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = iter(child.stderr.readline, "")
    try:
        ready = next(line for line in lines if line.startswith("ready on "))
        yield re.search(r"http://\S+", ready)[0]
    finally:
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=30)
        child.kill()
    assert child.returncode == 0


@pytest.mark.slow
def test_whole_and_streamed_answers_agree(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        request = {
            "model": "jllm",
            "messages": MESSAGES,
            "max_tokens": 24,
            "temperature": 0,
            "logprobs": True,
        }
        whole = client.chat.completions.create(**request)
        content = whole.choices[0].message.content
        assert len(content) > 24
        with client.chat.completions.create(**request, stream=True) as stream:
            chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == content
        scores = whole.choices[0].logprobs.content
        assert len(scores) == 24
        assert b"".join(bytes(score.bytes) for score in scores).decode() == content
        response = client.responses.create(
            model="jllm", input=MESSAGES[0]["content"], max_output_tokens=8
        )
        assert response.usage.output_tokens == 8
