"""The text of a real checkpoint, character for character, on every way in."""

import asyncio
import functools

import pytest

from jllm import LLM, AsyncLLM, SamplingParams
from jllm.cli import main

BOS = 1
NUM_TOKENS = 256
SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_blocks": 128}
"""Few rows and tokens, so that programs compile in a moment."""


@pytest.fixture(scope="module")
def model(shared_data):
    folder = shared_data / "data" / "stories260K"
    if not folder.is_dir():
        pytest.skip("no stories260K in the test data")
    return folder


@pytest.fixture(scope="module")
def golden(model):
    """The text that the file gives for temperature 0."""
    text = (model / "GOLDEN.md").read_text("utf-8")
    (story,) = [part for part in text.split("```") if "-t 0.0\n" in part]
    return story.split("-t 0.0\n", 1)[1].removesuffix("\n")


@pytest.fixture(scope="module")
def greedy():
    return SamplingParams(temperature=0, max_tokens=NUM_TOKENS)


@functools.cache
def llm(folder):
    return LLM(str(folder), **SMALL)


@pytest.mark.parametrize("prompt", ["", {"prompt_token_ids": [BOS]}], ids=str)
def test_llm(model, golden, greedy, prompt):
    (output,) = llm(model).generate(prompt, greedy, use_tqdm=False)
    assert output.prompt_token_ids == [BOS]
    assert output.outputs[0].text == golden


def test_llm_stream(model, golden, greedy):
    texts = [output.outputs[0].text for output in llm(model).stream("", greedy)]
    assert len(texts) > 100
    assert all(golden.startswith(text) for text in texts)
    assert texts[-1] == golden


def test_llm_in_a_batch_of_continuations(model, golden, greedy):
    """Prompts that begin the story go on with it, whatever they share."""
    tokenizer = llm(model).get_tokenizer()
    ids = [
        BOS,
        *llm(model).generate("", greedy, use_tqdm=False)[0].outputs[0].token_ids,
    ]
    counts = [1, 2, 17, 100, 33, 64, 65, 200, 250]
    prompts = [{"prompt_token_ids": list(ids[:count])} for count in counts]
    outputs = llm(model).generate(prompts, greedy, use_tqdm=False)
    for count, output in zip(counts, outputs, strict=True):
        assert [*ids[:count], *output.outputs[0].token_ids][: len(ids)] == list(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == golden


def test_async_llm(model, golden, greedy):
    async def stories():
        async with AsyncLLM(str(model), **SMALL) as engine:

            async def story():
                async for output in engine.generate("", greedy):
                    last = output
                return last.outputs[0].text

            return await asyncio.gather(*(story() for _ in range(3)))

    assert asyncio.run(stories()) == [golden] * 3


@pytest.mark.parametrize("prompt", [["--prompt", ""], ["--prompt-token-ids", "1"]])
def test_command_line(model, golden, capsys, prompt):
    arguments = ["generate", str(model), *prompt, "--temperature", "0"]
    arguments += ["--max-tokens", str(NUM_TOKENS)]
    for option, value in SMALL.items():
        arguments += [f"--{option.replace('_', '-')}", str(value)]
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().out.removesuffix("\n") == golden
