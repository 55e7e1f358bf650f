"""Continuations of prompts: how they are joined, and what is said of them."""

import math
from collections.abc import Sequence
from typing import Any

from jllm.errors import InvalidRequestError
from jllm.outputs import RequestOutput, ScoreOutput
from jllm.text.prompts import PreparedRequest, split_prompts


def split_continuations(prompts: Any, continuations: Any) -> list[tuple[Any, Any]]:
    """Pairs each prompt with the list of its continuations.

    Args:
        prompts: One prompt or a list of them.
        continuations: For one prompt a continuation or a list of them; for a list of
            prompts a list with as many such entries.

    Raises:
        InvalidRequestError: A prompt has none, or the lists are of different lengths.
    """
    items = split_prompts(prompts)
    is_one = len(items) == 1 and items[0] is prompts
    entries: Any = [continuations] if is_one else continuations
    if isinstance(entries, (str, bytes)) or not isinstance(entries, Sequence):
        raise _wrong("must be a list with an entry for each prompt")
    if len(entries) != len(items):
        raise _wrong(f"has {len(entries)} entries, but there are {len(items)} prompts")
    groups: list[list[Any]] = [split_prompts(entry) for entry in entries]
    for i, group in enumerate(groups):
        if not group:
            raise _wrong(f"has none for prompt {i}")
    return list(zip(items, groups, strict=True))


def _wrong(rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"continuations {rule}", parameter="continuations")


def score_output(prepared: PreparedRequest, output: RequestOutput) -> ScoreOutput:
    """Reads the scores of a continuation from its finished request.

    They are not a number where the model's output was not finite.
    """
    start = prepared.request.prompt_logprobs_start
    tokens = output.prompt_token_ids
    own = tokens[start:]
    entries = (output.prompt_logprobs or [])[1:]
    failed = len(entries) != len(own) or output.outputs[0].finish_reason == "error"
    if failed:
        logprobs, is_greedy = [math.nan] * len(own), False
    else:
        found = [
            entry[token] for entry, token in zip(entries, own, strict=True) if entry
        ]
        logprobs = [logprob.logprob for logprob in found]
        is_greedy = all(logprob.rank == 1 for logprob in found)
    return ScoreOutput(tokens[:start], own, logprobs, is_greedy)
