"""Log-probabilities of a step: what is asked of the device, what the caller gets."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jllm.engine.admission import Job
from jllm.sampling.logprobs import ResultLayout
from jllm.scheduler.plan import ScheduledRow, StepPlan
from jllm.types import TokenLogprobs


def wants_prompt_logprobs(plan: StepPlan, jobs: Sequence[Job]) -> bool:
    """Whether a step computes prompt tokens whose successors are to be scored."""
    return any(
        job.prompt_logprobs is not None
        and row.position < len(job.prompt_logprobs)
        and row.position + row.num_tokens > job.first_scored
        for row, job in _chunks(plan, jobs)
    )


def wants_sampler(plan: StepPlan, jobs: Sequence[Job]) -> bool:
    """Whether a row that samples has rules, or is to have log-probabilities."""
    # Runs in every step over every row, hence the search in two passes.
    if all(job.rules is None for job in jobs):
        return False
    return any(
        samples and job.rules is not None
        for samples, job in zip(plan.samples, jobs, strict=True)
    )


def _chunks(plan: StepPlan, jobs: Sequence[Job]) -> Iterator[tuple[ScheduledRow, Job]]:
    """The rows that may compute tokens of a prompt, with their sequences."""
    return zip(plan.chunks, jobs[len(plan.decoding) :], strict=True)


def next_tokens(plan: StepPlan, jobs: Sequence[Job], num_tokens: int) -> np.ndarray:
    """For every token of the step the prompt token after it, zero past the prompt."""
    targets = np.zeros(num_tokens, np.int32)
    start = len(plan.decoding)
    for row, job in _chunks(plan, jobs):
        first = row.position + 1
        known = job.request.prompt_token_ids[first : first + row.num_tokens]
        targets[start : start + len(known)] = known
        start += row.num_tokens
    return targets


def collect_prompt_logprobs(
    plan: StepPlan, jobs: Sequence[Job], layout: ResultLayout, packed: np.ndarray
) -> None:
    """Files the scores of a step with the sequences that asked for them."""
    start = len(plan.decoding)
    for row, job in _chunks(plan, jobs):
        entries = job.prompt_logprobs
        if entries is not None:
            count = job.request.params.prompt_logprobs
            first = max(job.first_scored - row.position, 0)
            for i in range(first, min(row.num_tokens, len(entries) - row.position)):
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
