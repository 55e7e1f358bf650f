"""Pooled hidden states against those of transformers, however they were computed."""

import functools

import numpy as np
import pytest

from jllm.pooling import POOLINGS, PoolingParams
from jllm.text.embedding import make_embedding
from jllm.types import EngineRequest, SamplingParams
from tests.engines import drain, request
from tests.parity.oracle import (
    TOLERANCE,
    WHOLE,
    checkpoint,
    engine_for,
    random_prompt,
    torch,
)

LENGTHS = (1, 2, 31, 32, 33, 97, 200)
"""Around the token budget of 32, and over several chunks."""


@functools.cache
def shared_engine(family, **options):
    return engine_for(checkpoint(family).folder, compile_ahead=False, **options)


def pooled(request_id, prompt, **fields):
    return EngineRequest(
        request_id=str(request_id),
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(temperature=0),
        pooling=PoolingParams(**fields),
    )


@functools.cache
def hidden_states(family, prompt):
    """What transformers has after its last norm, `[T, E]` in float64."""
    with torch.no_grad():
        inner = checkpoint(family).model.model(torch.tensor([prompt]))
    return inner.last_hidden_state[0].double().numpy()


def expected(family, prompt, pooling):
    hidden = hidden_states(family, tuple(prompt))
    found = {"last": hidden[-1], "cls": hidden[0], "mean": hidden.mean(axis=0)}
    return found[pooling]


def vectors(engine, requests, on_step=None):
    for item in requests:
        engine.add(item)
    outputs = drain(engine, on_step)
    names = {item.request_id for item in requests if item.pooling}
    own = [output for output in outputs if output.request_id in names]
    # One output each, and no tokens.
    assert sorted(names) == sorted(output.request_id for output in own)
    assert {(output.finish_reason, output.token_ids) for output in own} == {
        ("stop", ())
    }
    return {output.request_id: output.pooled for output in own}


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_alone_and_in_a_batch(family, pooling):
    engine = shared_engine(family)
    prompts = {str(length): random_prompt(length, seed=length) for length in LENGTHS}
    items = [pooled(name, prompt, pooling=pooling) for name, prompt in prompts.items()]
    alone = {}
    for item in items:
        alone |= vectors(engine, [item])
    engine.reset_prefix_cache()
    # Beside requests that generate.
    others = [request(f"g{i}", random_prompt(40, seed=i), max_tokens=9) for i in (1, 2)]
    batched = vectors(engine, [items[0], others[0], *items[1:], others[1]])
    for name, prompt in prompts.items():
        exact = expected(family, prompt, pooling)
        np.testing.assert_allclose(alone[name], exact, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(batched[name], exact, rtol=0, atol=TOLERANCE)
    engine.scheduler.check_integrity()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_preempted(pooling):
    """Each pooled prompt loses its blocks in the middle and is computed again."""
    engine = shared_engine("llama")
    prompts = {str(i): random_prompt(90 + i, seed=i) for i in range(3)}
    preempted = []

    def preempt(_):
        for running in list(engine.scheduler.running):
            has_chunk = 0 < running.num_computed_tokens < 80
            if has_chunk and running.num_preemptions < 2:
                preempted.append(engine.scheduler.preempt(running))

    items = [pooled(name, prompt, pooling=pooling) for name, prompt in prompts.items()]
    found = vectors(engine, items, preempt)
    assert sum(preempted) >= 3
    for name, prompt in prompts.items():
        exact = expected("llama", prompt, pooling)
        np.testing.assert_allclose(found[name], exact, rtol=0, atol=TOLERANCE)


def test_the_prefix_cache_serves_the_last_token_only():
    engine = shared_engine("llama")
    engine.reset_prefix_cache()
    prompt, hits = random_prompt(64, seed=5), []
    for pooling in ("last", "last", "mean", "cls"):
        before = engine.scheduler.num_prefix_hits
        found = vectors(engine, [pooled("a", prompt, pooling=pooling)])
        exact = expected("llama", prompt, pooling)
        np.testing.assert_allclose(found["a"], exact, rtol=0, atol=TOLERANCE)
        hits.append(engine.scheduler.num_prefix_hits - before)
    # All but the last token, which is computed again.
    assert hits == [0, len(prompt) - 1, 0, 0]


def test_dimensions_are_cut_before_normalising():
    prompt = random_prompt(20, seed=3)
    (vector,) = vectors(shared_engine("llama"), [pooled("a", prompt)]).values()
    exact = expected("llama", prompt, "last")
    for fields, own in (
        ({}, exact / np.linalg.norm(exact)),
        ({"normalize": False}, exact),
        ({"dimensions": 8}, exact[:8] / np.linalg.norm(exact[:8])),
        ({"dimensions": 8, "normalize": False}, exact[:8]),
    ):
        embedding = make_embedding(vector, PoolingParams(**fields))
        assert embedding.dtype == np.float32
        np.testing.assert_allclose(embedding, own, rtol=0, atol=TOLERANCE)


def test_a_prompt_as_long_as_the_context_is_pooled():
    saved = checkpoint("llama")
    length = saved.model.config.max_position_embeddings
    prompt = random_prompt(length, seed=9)
    # As many blocks as the prompt fills: there is no room for a token after it.
    engine = engine_for(saved.folder, num_blocks=length // 8, compile_ahead=False)
    found = vectors(engine, [pooled(k, prompt, pooling=k) for k in POOLINGS])
    for pooling in POOLINGS:
        exact = expected("llama", prompt, pooling)
        np.testing.assert_allclose(found[pooling], exact, rtol=0, atol=TOLERANCE)
    engine.close()
