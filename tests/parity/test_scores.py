"""Scores of continuations against torch."""

import dataclasses
import math

import numpy as np
import pytest

from jllm.errors import InvalidRequestError
from jllm.llm import LLM
from jllm.types import StepOutputs
from tests.parity.oracle import SMALL, TOLERANCE, VOCAB, checkpoint, random_prompt

QUIET = {"use_tqdm": False}


@pytest.fixture(scope="module")
def llm():
    saved = checkpoint("qwen3")
    with LLM(
        str(saved.folder), skip_tokenizer_init=True, compile_ahead=False, **SMALL
    ) as llm:
        yield llm


def expected(prompt, continuation):
    """Log-probabilities, and whether each token is the best."""
    rows = checkpoint("qwen3").logprobs(prompt + continuation)[len(prompt) - 1 : -1]
    own = rows[np.arange(len(continuation)), continuation]
    return own, bool((own == rows.max(axis=1)).all())


def check(output, prompt, continuation):
    own, is_greedy = expected(prompt, continuation)
    assert output.prompt_token_ids == prompt
    assert output.token_ids == continuation
    assert output.is_greedy == is_greedy
    np.testing.assert_allclose(output.logprobs, own, rtol=0, atol=TOLERANCE)
    assert output.score == pytest.approx(own.sum(), abs=len(own) * TOLERANCE)


def test_continuations_of_several_prompts(llm):
    """Longer than a chunk, of one token, and what greedy decoding gives."""
    prompts = [random_prompt(length, seed=length) for length in (1, 7, 64, 150)]
    groups = [
        [random_prompt(count, seed=count) for count in (1, 5, 60)] for _ in prompts
    ]
    for prompt, group in zip(prompts, groups, strict=True):
        group.append(checkpoint("qwen3").greedy(prompt, 10))
    outputs = llm.score(prompts, groups, **QUIET)
    for prompt, group, output in zip(prompts, groups, outputs, strict=True):
        for continuation, own in zip(group, output.outputs, strict=True):
            check(own, prompt, continuation)
        assert [own.is_greedy for own in output.outputs] == [False] * 3 + [True]


def test_what_continuations_share_is_computed_once(llm):
    scheduler = llm.engine.scheduler
    llm.reset_prefix_cache()
    prompt = random_prompt(64, seed=1)
    group = [[i, i + 1] for i in range(5)]
    before = scheduler.num_prefix_hits, llm.engine.metrics.scheduled_tokens
    (output,) = llm.score([prompt], [group], **QUIET)
    hits = scheduler.num_prefix_hits - before[0]
    # All but the last token, whose scores are those of the first of a continuation.
    assert hits == 4 * 63
    assert llm.engine.metrics.scheduled_tokens - before[1] == 64 + 2 + 4 * 3
    for continuation, own in zip(group, output.outputs, strict=True):
        check(own, prompt, continuation)


def test_one_prompt_and_one_continuation(llm):
    prompt = random_prompt(9)
    (output,) = llm.score(prompt, [3, 4], **QUIET)
    (own,) = output.outputs
    check(own, prompt, [3, 4])
    (output,) = llm.score({"prompt_token_ids": prompt}, [[3, 4], [5]], **QUIET)
    assert [own.token_ids for own in output.outputs] == [[3, 4], [5]]
    outputs = llm.score([prompt, [1]], [[3, 4], [[5], [6]]], **QUIET)
    assert [len(output.outputs) for output in outputs] == [1, 2]


@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        ([[1], [2]], [[3]], "1 entries, but there are 2 prompts"),
        ([[1], [2]], "ab", "a list with an entry for each prompt"),
        ([[1]], [[]], "none for prompt 0"),
        ([1], [[2], []], "continuation 1: the continuation has no tokens"),
        ([[1], []], [[2], [3]], "prompt 1, continuation 0: the prompt has no tokens"),
        ([1], [VOCAB], "vocabulary"),
        ([1] * 200, [2] * 100, "maximum context length"),
        ([1], "a", "needs a tokenizer"),
    ],
)
def test_what_is_refused(llm, prompts, continuations, message):
    with pytest.raises(InvalidRequestError, match=message):
        llm.score(prompts, continuations, **QUIET)
    assert not llm.engine.has_unfinished


def test_an_output_that_is_not_finite(llm, monkeypatch):
    step = llm.engine.step
    failed = {"finish_reason": "error", "error": "not finite", "prompt_logprobs": None}
    monkeypatch.setattr(
        llm.engine,
        "step",
        lambda: StepOutputs(
            others=[dataclasses.replace(output, **failed) for output in step()]
        ),
    )
    (output,) = llm.score([1, 2], [3, 4], **QUIET)
    assert math.isnan(output.outputs[0].score)
    assert not output.outputs[0].is_greedy
