"""From pooled hidden states to the outputs that users get."""

import asyncio
import logging

import numpy as np
import pytest

from jllm.async_llm import AsyncLLM
from jllm.errors import InvalidRequestError
from jllm.llm import LLM
from jllm.pooling import PoolingParams
from jllm.text.embedding import EmbeddingStream, make_embedding
from jllm.text.prompts import PreparedRequest
from jllm.types import EngineRequest, SamplingParams, TokenOutput
from tests.fakes import BOS, WIDTH, FakeEngine

QUIET = {"use_tqdm": False}


def raw(num_tokens):
    """The vector of the fake engine for a prompt of so many tokens."""
    return 1.0 + np.arange(WIDTH) * num_tokens


def unit(vector):
    return vector / np.linalg.norm(vector)


@pytest.fixture
def make(monkeypatch):
    def make(kind=LLM, **options):
        engine = FakeEngine(**options)
        monkeypatch.setattr(f"{kind.__module__}.create_engine", lambda config: engine)
        return kind("model"), engine

    return make


def test_a_vector_of_zeros_stays_as_it_is():
    params = PoolingParams(dimensions=3)
    np.testing.assert_array_equal(make_embedding(np.zeros(5), params), np.zeros(3))


def test_a_tiny_vector_is_normalised():
    found = make_embedding(np.full(4, 1e-40), PoolingParams())
    np.testing.assert_allclose(found, 0.5)


def test_outputs_are_in_the_order_of_the_prompts(make):
    llm, engine = make()
    outputs = llm.embed(["abc", [7], {"prompt": "a", "cache_salt": "s"}], **QUIET)
    assert [o.prompt_token_ids for o in outputs] == [[BOS, *b"abc"], [7], [BOS, 97]]
    for output, count in zip(outputs, (4, 1, 2), strict=True):
        assert output.finished
        assert output.num_cached_tokens == 3
        assert output.outputs.embedding.dtype == np.float32
        assert output.outputs.hidden_size == WIDTH
        assert output.outputs.finish_reason == "stop"
        np.testing.assert_allclose(output.outputs.embedding, unit(raw(count)), 1e-6)
    assert [added.cache_salt for added in engine.added] == [None, None, "s"]
    assert llm.embed([], **QUIET) == []


def test_options(make):
    llm, engine = make()
    (output,) = llm.embed(
        "abc",
        pooling="mean",
        normalize=False,
        dimensions=3,
        truncate_prompt_tokens=2,
        priority=5,
        **QUIET,
    )
    np.testing.assert_allclose(output.outputs.embedding, raw(2)[:3])
    (added,) = engine.added
    assert added.prompt_token_ids == tuple(b"bc")
    assert (added.pooling.pooling, added.priority) == ("mean", 5)


def test_truncated_to_the_whole_context(make):
    llm, _ = make(max_model_len=16)
    (output,) = llm.embed("x" * 40, truncate_prompt_tokens=-1, **QUIET)
    assert len(output.prompt_token_ids) == 16


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a", "x" * 128], {}, "prompt 1: .*128 tokens.*129"),
        (["a", []], {}, "prompt 1: the prompt is empty"),
        ("a", {"dimensions": WIDTH + 1}, f"prompt 0: dimensions={WIDTH + 1}"),
        ("a", {"pooling": "max"}, "pooling='max'"),
        ([5.0], {}, "prompt 0: the prompt must be"),
        ("a", {"priority": [1, 2]}, "priority has 2 entries"),
    ],
)
def test_what_is_refused(make, prompts, options, message):
    llm, engine = make()
    with pytest.raises(InvalidRequestError, match=message):
        llm.embed(prompts, **options, **QUIET)
    assert engine.added == []


def test_an_error_leaves_the_others(make, caplog):
    llm, engine = make()
    engine.error_for = "1"
    with caplog.at_level(logging.WARNING):
        outputs = llm.embed(["a", "b", "c"], **QUIET)
    assert [o.outputs.finish_reason for o in outputs] == ["stop", "error", "stop"]
    assert outputs[1].outputs.hidden_size == 0
    assert "not finite" in caplog.text


def test_beside_a_stream(make):
    llm, _ = make(answer="hello")
    stream = llm.stream("a", SamplingParams(max_tokens=None))
    first = next(stream)
    assert first.outputs[0].text == "h"
    assert len(llm.embed("b", **QUIET)) == 1
    assert list(stream)[-1].outputs[0].text == "hello"


def test_online(make):
    async def run():
        llm, engine = make(AsyncLLM)
        async with llm:
            outputs = await asyncio.gather(
                llm.embed("abc"), llm.embed([7], normalize=False, dimensions=2)
            )
            np.testing.assert_allclose(outputs[0].outputs.embedding, unit(raw(4)), 1e-6)
            np.testing.assert_allclose(outputs[1].outputs.embedding, raw(1)[:2])
            with pytest.raises(InvalidRequestError, match="dimensions"):
                await llm.embed("a", dimensions=WIDTH + 1)
            with pytest.raises(InvalidRequestError, match="PoolingParams"):
                await llm.submit("a", {"pooling": "mean"})
            assert llm.num_open == 0
            assert len(engine.added) == 2

    asyncio.run(run())


def test_aborted_online(make):
    async def run():
        llm, engine = make(AsyncLLM)
        blocked = asyncio.Event()
        loop = asyncio.get_running_loop()
        engine.on_step = lambda _: asyncio.run_coroutine_threadsafe(
            blocked.wait(), loop
        ).result()
        async with llm:
            stream = await llm.submit("a", PoolingParams(), "mine")
            await llm.abort("mine")
            (output,) = [output async for output in stream]
            assert output.outputs.finish_reason == "abort"
            blocked.set()

    asyncio.run(run())


def test_it_is_given_once():
    request = EngineRequest("a", (1, 2), SamplingParams(), pooling=PoolingParams())
    stream = EmbeddingStream(PreparedRequest(request, None), PoolingParams())
    assert stream.take() is None
    pooled = TokenOutput("a", 0, (), finish_reason="stop", pooled=np.ones(4))
    assert stream.push(pooled) is False
    stream.abort()
    assert stream.push(pooled) is False
    assert stream.take().outputs.finish_reason == "stop"
    assert stream.take() is None
    assert stream.num_tokens == 2
