"""Log-probabilities of a step: what is asked of the device, what the caller gets."""

from collections.abc import Mapping, Sequence

import numpy as np

from jllm.engine.admission import Job
from jllm.sampling.logprobs import ResultLayout
from jllm.scheduler.plan import StepPlan
from jllm.types import TokenLogprobs


def wants_prompt_logprobs(plan: StepPlan, jobs: Sequence[Job]) -> bool:
    """Whether a step computes prompt tokens whose successors are to be scored."""
    return any(
        job.prompt_logprobs is not None and row.position < len(job.prompt_logprobs)
        for row, job in zip(plan.rows, jobs, strict=True)
    )


def wants_sampler(plan: StepPlan, jobs: Sequence[Job]) -> bool:
    """Whether a row that samples has rules, or is to have log-probabilities."""
    return any(
        row.samples and job.rules is not None
        for row, job in zip(plan.rows, jobs, strict=True)
    )


def next_tokens(plan: StepPlan, jobs: Sequence[Job], num_tokens: int) -> np.ndarray:
    """For every token of the step the prompt token after it, zero past the prompt."""
    targets = np.zeros(num_tokens, np.int32)
    start = 0
    for row, job in zip(plan.rows, jobs, strict=True):
        first = row.position + 1
        known = job.request.prompt_token_ids[first : first + row.num_tokens]
        targets[start : start + len(known)] = known
        start += row.num_tokens
    return targets


def collect_prompt_logprobs(
    plan: StepPlan, jobs: Sequence[Job], layout: ResultLayout, packed: np.ndarray
) -> None:
    """Files the scores of a step with the sequences that asked for them."""
    start = 0
    for row, job in zip(plan.rows, jobs, strict=True):
        entries = job.prompt_logprobs
        if entries is not None:
            count = job.request.params.prompt_logprobs
            for i in range(min(row.num_tokens, len(entries) - row.position)):
                target = job.request.prompt_token_ids[row.position + i + 1]
                result = layout.unpack(packed[start + i])
                entries[row.position + i] = token_logprobs(result, target, count)
        start += row.num_tokens


def token_logprobs(
    entry: Mapping[str, np.ndarray],
    token_id: int,
    count: int | None,
    requested: tuple[int, ...] = (),
) -> TokenLogprobs:
    """One unpacked result for the caller: the best `count`, or those asked for."""
    if requested:
        ids, values = requested, entry["requested"][: len(requested)]
    else:
        width = len(entry["top_ids"])
        kept = width if count == -1 else min(count or 0, width)
        ids, values = entry["top_ids"][:kept], entry["top_logprobs"][:kept]
    return TokenLogprobs(
        token_id=token_id,
        logprob=entry["logprob"].item(),
        rank=entry["rank"].item(),
        top_ids=tuple(np.asarray(ids).tolist()),
        top_logprobs=tuple(values.tolist()),
    )
