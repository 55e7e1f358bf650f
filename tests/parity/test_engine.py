"""Tokens and scores of the engine against transformers."""

import functools

import numpy as np
import pytest

from tests.engines import request
from tests.parity.oracle import (
    TOLERANCE,
    VOCAB,
    WHOLE,
    check_entry,
    checkpoint,
    engine_for,
    random_prompt,
    run_all,
)

GREEDY = {"temperature": 0, "ignore_eos": True}


@functools.cache
def shared_engine(family):
    """An engine that reports the whole vocabulary; idle between tests."""
    return engine_for(checkpoint(family).folder, max_logprobs=-1)


@pytest.mark.parametrize("family", WHOLE)
def test_greedy_tokens_for_64_steps(family):
    """Prompts of one token, of one chunk and of several, in one batch."""
    saved = checkpoint(family)
    prompts = [random_prompt(length, seed=length) for length in (1, 21, 70, 90)]
    requests = [
        request(i, prompt, max_tokens=64, **GREEDY) for i, prompt in enumerate(prompts)
    ]
    tokens, _, _ = run_all(shared_engine(family), requests)
    for i, prompt in enumerate(prompts):
        expected = saved.greedy(prompt, 64)
        assert len(set(expected)) > 8  # or agreement would mean little
        assert tokens[(str(i), 0)] == expected


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("shared_tokens", [64, 70])
def test_scores_after_a_prefix_hit(family, shared_tokens):
    """Of the whole vocabulary, for a prompt that ends within a cached block and not."""
    saved, engine = checkpoint(family), shared_engine(family)
    first = random_prompt(96, seed=shared_tokens)
    run_all(engine, [request("first", first, max_tokens=1, **GREEDY)])
    prompt = first[:shared_tokens] + random_prompt(7, seed=1)
    again = request("hit", prompt, max_tokens=12, logprobs=-1, **GREEDY)
    tokens, entries, outputs = run_all(engine, [again])
    assert outputs[0].num_cached_tokens == 64
    tokens = tokens[("hit", 0)]
    assert tokens == saved.greedy(prompt, 12)
    expected = saved.logprobs(prompt + tokens)[len(prompt) - 1 : -1]
    for entry, row in zip(entries[("hit", 0)], expected, strict=True):
        check_entry(entry, row, count=VOCAB)


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_checkpoint_computed_in_float32(family, dtype):
    saved = checkpoint(family, dtype=dtype)
    engine = engine_for(saved.folder, dtype="float32")
    prompt = random_prompt(40)
    tokens, _, _ = run_all(engine, [request("a", prompt, max_tokens=64, **GREEDY)])
    engine.close()
    assert tokens[("a", 0)] == saved.greedy(prompt, 64)


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_a_16_bit_checkpoint_as_saved(family, dtype, atol):
    """Every token has the probability that torch gives it, within the type's error."""
    saved = checkpoint(family, dtype=dtype)
    engine = engine_for(saved.folder, max_num_seqs=1)  # few programs
    assert engine._parts.model.options.dtype == dtype
    prompts = [random_prompt(length, seed=length) for length in (5, 70)]
    requests = [
        request(i, prompt, max_tokens=32, logprobs=5, **GREEDY)
        for i, prompt in enumerate(prompts)
    ]
    tokens, entries, _ = run_all(engine, requests)
    engine.close()
    for i, prompt in enumerate(prompts):
        key = (str(i), 0)
        expected = saved.logprobs(prompt + tokens[key])[len(prompt) - 1 : -1]
        assert len(entries[key]) == 32
        for entry, row in zip(entries[key], expected, strict=True):
            check_entry(entry, row, count=5, atol=atol)


def test_every_bucket_gives_the_same_scores():
    """The same request in programs of all sizes, once they are all compiled."""
    saved, engine = checkpoint("llama"), shared_engine("llama")
    engine.programs.wait()
    prompts = [random_prompt(50, seed=seed) for seed in range(4)]
    for count in (1, 4):
        requests = [
            request(i, prompt, max_tokens=8, logprobs=20, **GREEDY)
            for i, prompt in enumerate(prompts[:count])
        ]
        tokens, entries, _ = run_all(engine, requests)
        for i, prompt in enumerate(prompts[:count]):
            key = (str(i), 0)
            expected = saved.logprobs(prompt + tokens[key])[len(prompt) - 1 : -1]
            best = np.argmax(expected, axis=-1)
            np.testing.assert_array_equal(tokens[key], best)
            for entry, row in zip(entries[key], expected, strict=True):
                check_entry(entry, row, count=20, atol=TOLERANCE)
