"""Log-probabilities of outputs and prompts against torch."""

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

SAMPLING = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0, "seed": 5},
    # Scores are the model's own, whatever the token was drawn from.
    "filtered": {"temperature": 0.7, "seed": 6, "top_k": 50, "top_p": 0.9},
    "penalised": {"temperature": 1.0, "seed": 7, "repetition_penalty": 1.5},
    "biased": {"temperature": 0, "logit_bias": {17: 50.0}},
}


@functools.cache
def shared_engine(family, **options):
    return engine_for(checkpoint(family).folder, **options)


def after_prompt(saved, prompt, tokens):
    """What torch expects for each generated token."""
    return saved.logprobs(prompt + tokens)[len(prompt) - 1 : -1]


@pytest.mark.parametrize("family", WHOLE)
def test_sampled_tokens(family):
    """All ways of sampling in one batch: own score, rank, and the best five."""
    saved = checkpoint(family)
    prompts = {
        name: random_prompt(20 + 9 * i, seed=i) for i, name in enumerate(SAMPLING)
    }
    requests = [
        request(
            name, prompts[name], max_tokens=16, ignore_eos=True, logprobs=5, **rules
        )
        for name, rules in SAMPLING.items()
    ]
    tokens, entries, _ = run_all(shared_engine(family), requests)
    ranks = set()
    for name, prompt in prompts.items():
        key = (name, 0)
        expected = after_prompt(saved, prompt, tokens[key])
        assert [entry.token_id for entry in entries[key]] == tokens[key]
        for entry, row in zip(entries[key], expected, strict=True):
            check_entry(entry, row, count=5)
            assert list(entry.top_ids) == np.argsort(-row)[:5].tolist()
            ranks.add(entry.rank)
    assert len(ranks) > 10
    assert tokens[("biased", 0)] == [17] * 16


@pytest.mark.parametrize("count", [0, 1, 20])
def test_so_many_are_returned(count):
    saved, prompt = checkpoint("llama"), random_prompt(30)
    item = request("a", prompt, max_tokens=4, temperature=0, logprobs=count)
    tokens, entries, _ = run_all(shared_engine("llama"), [item])
    expected = after_prompt(saved, prompt, tokens[("a", 0)])
    for entry, row in zip(entries[("a", 0)], expected, strict=True):
        check_entry(entry, row, count=count)


def test_the_whole_vocabulary():
    saved, prompt = checkpoint("llama"), random_prompt(45)
    engine = engine_for(saved.folder, max_logprobs=-1)
    params = {"logprobs": -1, "prompt_logprobs": -1, "max_tokens": 6}
    tokens, entries, outputs = run_all(engine, [request("a", prompt, **params)])
    engine.close()
    expected = saved.logprobs(prompt + tokens[("a", 0)])
    everything = [*outputs[0].prompt_logprobs, *entries[("a", 0)]]
    for entry, row in zip(everything, expected[:-1], strict=True):
        check_entry(entry, row, count=VOCAB)


@pytest.mark.parametrize("family", WHOLE)
def test_asked_for_tokens(family):
    saved, prompt = checkpoint(family), random_prompt(33)
    asked = (330, 5, 0, 77)
    item = request(
        "a", prompt, max_tokens=8, temperature=1.0, seed=1, logprob_token_ids=asked
    )
    tokens, entries, _ = run_all(shared_engine(family), [item])
    expected = after_prompt(saved, prompt, tokens[("a", 0)])
    for entry, row in zip(entries[("a", 0)], expected, strict=True):
        assert entry.top_ids == asked
        np.testing.assert_allclose(
            entry.top_logprobs, row[list(asked)], rtol=0, atol=TOLERANCE
        )
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=TOLERANCE)


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("prompt_logprobs", [0, 5])
def test_prompt_of_several_chunks(family, prompt_logprobs):
    """The prompt is cached already, and other requests run beside it."""
    saved, engine = checkpoint(family), shared_engine(family)
    prompt = random_prompt(100, seed=prompt_logprobs)
    cached = request("cached", prompt, max_tokens=1, temperature=0)
    run_all(engine, [cached])
    params = {"prompt_logprobs": prompt_logprobs, "max_tokens": 3, "temperature": 0}
    beside = [
        request("one", prompt[:50], max_tokens=20, temperature=0, ignore_eos=True),
        request("two", prompt[:9], max_tokens=9, logprobs=2, temperature=0),
    ]
    requests = [beside[0], request("a", prompt, **params), beside[1]]
    tokens, _, outputs = run_all(engine, requests)
    own = [output for output in outputs if output.request_id == "a"]
    assert own[0].prompt_logprobs is not None
    assert all(output.prompt_logprobs is None for output in own[1:])
    expected = saved.logprobs(prompt)
    entries = own[0].prompt_logprobs
    assert [entry.token_id for entry in entries] == prompt[1:]
    for entry, row in zip(entries, expected[:-1], strict=True):
        check_entry(entry, row, count=prompt_logprobs)
    assert tokens[("one", 0)] == saved.greedy(prompt[:50], 20)


def test_a_prompt_of_one_token_has_no_scores():
    item = request("a", [7], prompt_logprobs=3, max_tokens=2)
    _, _, outputs = run_all(shared_engine("llama"), [item])
    assert outputs[0].prompt_logprobs == ()


def test_prompt_scores_beside_forks():
    """With n outputs the prompt is scored once, and each output has its own scores."""
    saved, prompt = checkpoint("llama"), random_prompt(61)
    item = request(
        "a", prompt, n=3, seed=9, max_tokens=8, logprobs=4, prompt_logprobs=4
    )
    tokens, entries, outputs = run_all(shared_engine("llama"), [item])
    scored = [output for output in outputs if output.prompt_logprobs is not None]
    assert [output.index for output in scored] == [0]
    rows = saved.logprobs(prompt)[:-1]
    for entry, row in zip(scored[0].prompt_logprobs, rows, strict=True):
        check_entry(entry, row, count=4)
    assert len({tuple(ids) for ids in tokens.values()}) == 3
    for key, ids in tokens.items():
        expected = after_prompt(saved, prompt, ids)
        for entry, row in zip(entries[key], expected, strict=True):
            check_entry(entry, row, count=4)
