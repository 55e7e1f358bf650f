"""Grammars of the rows of a step: masks before it samples, tokens after it."""

from collections.abc import Collection, Sequence

import numpy as np

from jllm.engine.admission import Job
from jllm.sampling.grammar import GrammarError
from jllm.scheduler.plan import StepPlan


def wants_grammars(plan: StepPlan, jobs: Sequence[Job]) -> bool:
    """Whether a row that samples has a grammar."""
    return any(
        samples and job.matcher is not None
        for samples, job in zip(plan.samples, jobs, strict=True)
    )


def pack_masks(
    plan: StepPlan, jobs: Sequence[Job], num_rows: int, num_words: int
) -> np.ndarray:
    """What each row of a step may sample, as bit sets `i32[S, A]`.

    A grammar that fails is noted in its job, and its row may sample anything: the
    sequence ends with an error when the step is read.
    """
    masks = np.full((num_rows, num_words), -1, np.int32)
    for i, (samples, job) in enumerate(zip(plan.samples, jobs, strict=True)):
        matcher = job.matcher
        if matcher is None or not samples:
            continue
        # The step before may have ended the sequence; its token is then not looked at.
        if matcher.is_complete or job.failure is not None:
            continue
        try:
            masks[i] = matcher.mask()
        except GrammarError as error:
            job.failure = f"structured_outputs: {error}"
    return masks


def push_tokens(
    plan: StepPlan,
    jobs: Sequence[Job],
    tokens: Sequence[int],
    lost: Collection[int] = (),
) -> frozenset[int]:
    """Leads the grammars on by the sampled tokens.

    Args:
        plan: The step.
        jobs: The sequences of its rows; a failure is noted in them.
        tokens: The token of each row.
        lost: Rows whose token will not be taken, since it is computed again.

    Returns:
        The rows of the plan whose grammar is complete: nothing can follow.
    """
    complete: set[int] = set()
    for i, (samples, job) in enumerate(zip(plan.samples, jobs, strict=True)):
        matcher = job.matcher
        if matcher is None or not samples or tokens[i] in job.stop_token_ids:
            continue
        if i in lost:
            continue
        if matcher.is_complete or job.failure is not None:
            continue
        try:
            if matcher.push(tokens[i]):
                complete.add(i)
        except GrammarError as error:
            job.failure = f"structured_outputs: {error}"
    return frozenset(complete)
