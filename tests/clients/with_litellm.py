"""litellm: answers and streams, both APIs, and its mapping of our errors."""

import asyncio
import contextlib
import sys

import litellm

MESSAGES = [{"role": "user", "content": "Once upon a time"}]


async def check_async(options):
    stream = await litellm.acompletion(messages=MESSAGES, stream=True, **options)
    assert [chunk async for chunk in stream]


def main(url):
    options = {
        "model": "hosted_vllm/jllm",
        "api_base": f"{url}/v1",
        "api_key": "none",
        "max_tokens": 8,
    }
    answer = litellm.completion(messages=MESSAGES, **options)
    assert answer.choices[0].finish_reason == "length", answer
    assert answer.usage.completion_tokens == 8, answer
    greedy = options | {"temperature": 0}
    whole = litellm.completion(messages=MESSAGES, **greedy).choices[0].message.content
    chunks = litellm.completion(messages=MESSAGES, stream=True, **greedy)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole, (text, whole)
    asyncio.run(check_async(options))
    plain = options | {"model": "text-completion-openai/jllm"}
    answer = litellm.text_completion(prompt="Once upon a time", **plain)
    assert answer.choices[0].text, answer
    long = [{"role": "user", "content": "x" * 100_000}]
    # litellm knows it by its words, and callers shorten the prompt on it.
    with contextlib.suppress(litellm.ContextWindowExceededError):
        litellm.completion(messages=long, **options)
        raise AssertionError("a prompt longer than the context was accepted")


if __name__ == "__main__":
    main(*sys.argv[1:])
