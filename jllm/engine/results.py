"""A launched step, and what callers are told of it."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jllm.engine.admission import Job
from jllm.engine.capture import Captures
from jllm.engine.inputs import InputLayout
from jllm.engine.logprobs import token_logprobs
from jllm.engine.pooling import PoolSegment
from jllm.sampling.logprobs import ResultLayout
from jllm.scheduler.launched import SequenceUpdate, StepUpdates
from jllm.scheduler.plan import StepPlan
from jllm.types import StepOutputs, TokenOutput

NOT_FINITE = "the model's output was not finite"


@dataclasses.dataclass(frozen=True, slots=True)
class InFlight:
    """A launched step whose tokens have not been read.

    Attributes:
        plan: What it computes.
        jobs: The sequences of its rows; some may end before it is read.
        packed: Its result on the device, on its way to the host.
        has_logprobs: Whether the result is the sampler program's.
        is_unsampled: Whether the sampler program has still to be called.
        layout: Sizes of the program that ran.
        prompt_packed: Prompt log-probabilities of all tokens of the step.
        segments: Its tokens whose hidden states are summed.
        sums: Their sums, f32[S, E].
        captures: The activations that it captures, None in most steps.
    """

    plan: StepPlan
    jobs: list[Job]
    packed: jax.Array
    has_logprobs: bool
    is_unsampled: bool
    layout: InputLayout
    prompt_packed: jax.Array | None = None
    segments: Sequence[PoolSegment] = ()
    sums: jax.Array | None = None
    captures: Captures | None = None


def step_outputs(
    updates: StepUpdates, flight: InFlight, packed: np.ndarray, layout: ResultLayout
) -> StepOutputs:
    """What callers are told; most sequences have a token and nothing else.

    Args:
        updates: What the step did to its sequences.
        flight: The step.
        packed: Its result.
        layout: Where each value lies in a row of it that has log-probabilities.
    """
    if flight.has_logprobs or flight.captures is not None:
        others = updates.one_by_one()
        return StepOutputs(
            others=[_full_output(update, flight, packed, layout) for update in others]
        )
    return StepOutputs(
        keys=[request.key for request in updates.requests],
        token_ids=updates.token_ids,
        others=[
            _full_output(update, flight, packed, layout) for update in updates.others
        ],
    )


def _full_output(
    update: SequenceUpdate, flight: InFlight, packed: np.ndarray, layout: ResultLayout
) -> TokenOutput:
    sequence = update.request
    job: Job = sequence.payload
    if job.pooled is not None:
        return _pooled_output(update, job)
    params = job.request.params
    logprobs = None
    wants = params.logprobs is not None or params.logprob_token_ids
    if flight.has_logprobs and wants and update.token_id is not None:
        entry = layout.unpack(packed[update.plan_index])
        ids = tuple(params.logprob_token_ids or ())
        logprobs = (token_logprobs(entry, update.token_id, params.logprobs, ids),)
    prompt = None
    if job.prompt_logprobs is not None and sequence.num_output_tokens <= 1:
        prompt = tuple(entry for entry in job.prompt_logprobs if entry)
    captured = job.probed.captured if job.probed else None
    failed = update.finish_reason == "error"
    stop_reason = sequence.stop_reason
    if stop_reason not in (params.stop_token_ids or ()):
        stop_reason = None  # the model's own stop token
    return TokenOutput(
        request_id=sequence.request_id,
        index=sequence.index,
        token_ids=() if update.token_id is None else (update.token_id,),
        logprobs=logprobs,
        prompt_logprobs=prompt,
        finish_reason=update.finish_reason,
        stop_reason=stop_reason,
        num_cached_tokens=sequence.num_cached_tokens,
        error=(job.failure or NOT_FINITE) if failed else None,
        is_complete=update.finish_reason == "stop" and job.is_complete,
        scheduled_time=job.scheduled_time,
        activations=() if captured is None else captured.take(),
    )


def _pooled_output(update: SequenceUpdate, job: Job) -> TokenOutput:
    """The one output of a pooled prompt; the token drawn after it is nobody's."""
    assert job.pooled is not None
    pooled = None
    if update.finish_reason != "error":
        # The step has looked at the last hidden state only.
        mean = job.pooled.mean
        pooled = mean if np.isfinite(mean).all() else None
    return TokenOutput(
        request_id=update.request.request_id,
        index=0,
        token_ids=(),
        finish_reason="error" if pooled is None else "stop",
        num_cached_tokens=update.request.num_cached_tokens,
        error=NOT_FINITE if pooled is None else None,
        scheduled_time=job.scheduled_time,
        pooled=pooled,
    )
