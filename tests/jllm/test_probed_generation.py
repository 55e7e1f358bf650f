"""Activations through `LLM` and `AsyncLLM`, and scores of the latter."""

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from jllm import LLM, AsyncLLM, Edit, SamplingParams
from jllm.probes import make_probes
from tests.engines import request, shared_engine

SECONDS = 60
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
PROMPT = list(range(3, 20))
CAPTURE = ("layers.*.resid",)


def double(x):
    return 2 * x


EDIT = {"embed": Edit(double)}


@pytest.fixture(scope="module")
def keeper():
    """An engine with one set for all tests, which a request keeps open."""
    engine = shared_engine()
    probes = make_probes(CAPTURE, EDIT)
    engine.prepare([dataclasses.replace(request("keeper", [3]), probes=probes)])
    yield engine
    engine.release("keeper")


@pytest.fixture
def engine(keeper, monkeypatch):
    """One for all; `close` must not end it."""
    engine = keeper
    monkeypatch.setattr(engine, "close", lambda: None)
    for module in ("llm", "async_llm"):
        monkeypatch.setattr(f"jllm.{module}.create_engine", lambda config: engine)
    yield engine
    assert (engine.num_open, engine._probing.num_open) == (0, 1)


@pytest.fixture
def llm(engine):
    with LLM(str(engine.info.path), skip_tokenizer_init=True) as llm:
        yield llm


def serve(engine, body):
    async def run():
        path = str(engine.info.path)
        async with AsyncLLM(path, skip_tokenizer_init=True) as llm:
            await asyncio.wait_for(body(llm), SECONDS)

    asyncio.run(run())


def generate(llm, prompts, params=PARAMS, **probes):
    outputs = llm.generate(prompts, params, use_tqdm=False, **probes)
    return [output.outputs[0] for output in outputs]


def test_per_prompt(llm):
    plain = generate(llm, [PROMPT, PROMPT[:5]])
    prompts, captures, edits = [PROMPT, PROMPT[:5]], [CAPTURE, None], [None, EDIT]
    first, second = generate(llm, prompts, capture=captures, edit=edits)
    assert first.token_ids == plain[0].token_ids
    assert set(first.activations) == {"layers.0.resid", "layers.1.resid"}
    assert first.activations["layers.1.resid"].shape == (22, 56)
    assert second.activations is None


def test_up_to_a_stop_token(llm):
    (plain,) = generate(llm, PROMPT, capture=CAPTURE)
    stop = plain.token_ids[2]
    length = plain.token_ids.index(stop) + 1
    params = SamplingParams(temperature=0, stop_token_ids=[stop], detokenize=False)
    (stopped,) = generate(llm, PROMPT, params, capture=CAPTURE)
    assert stopped.token_ids == plain.token_ids[:length]
    for name, values in stopped.activations.items():
        expected = plain.activations[name][: 17 + length - 1]
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_the_last_of_a_stream_has_them(engine, llm):
    (expected,) = generate(llm, PROMPT, capture=CAPTURE)

    async def body(llm):
        outputs = [
            output.outputs[0]
            async for output in llm.generate(PROMPT, PARAMS, capture=CAPTURE)
        ]
        assert outputs[-1].token_ids == expected.token_ids
        assert all(output.activations is None for output in outputs[:-1])
        for name, values in expected.activations.items():
            np.testing.assert_allclose(outputs[-1].activations[name], values, atol=1e-5)

    serve(engine, body)


def test_others_go_on_while_a_request_waits_for_its_program(engine, monkeypatch):
    """And one that is cancelled meanwhile is forgotten."""
    prepare, may_compile = engine.prepare, threading.Event()
    compiled = threading.Event()

    def slow(requests):
        assert may_compile.wait(SECONDS)
        prepare(requests)
        compiled.set()

    monkeypatch.setattr(engine, "prepare", slow)

    async def last(llm, **probes):
        outputs = [own async for own in llm.generate(PROMPT, PARAMS, **probes)]
        return outputs[-1].outputs[0]

    async def body(llm):
        waiting = asyncio.create_task(last(llm, capture=CAPTURE))
        leaving = asyncio.create_task(last(llm, edit=EDIT, capture=CAPTURE))
        plain = await last(llm)
        assert not waiting.done()
        leaving.cancel()
        may_compile.set()
        assert (await waiting).token_ids == plain.token_ids
        with pytest.raises(asyncio.CancelledError):
            await leaving
        while engine._probing.num_open > 1:
            await asyncio.sleep(0.01)

    serve(engine, body)
    assert compiled.is_set()


def test_scores_are_those_of_the_offline_ones(engine, llm):
    continuations = [[30, 31], [32], [33, 34, 35]]
    (expected,) = llm.score(PROMPT, continuations, use_tqdm=False)

    async def body(llm):
        found = await llm.score(PROMPT, continuations)
        for own, other in zip(found.outputs, expected.outputs, strict=True):
            assert own.token_ids == other.token_ids
            assert own.prompt_token_ids == PROMPT
            np.testing.assert_allclose(own.logprobs, other.logprobs, atol=1e-5)
        (one,) = (await llm.score(PROMPT, [30, 31])).outputs
        np.testing.assert_allclose(one.score, expected.outputs[0].score, atol=1e-5)
        assert llm.num_open == 0

    serve(engine, body)
