"""The engine: requests in, tokens out; sole holder of weights and device state."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jllm.engine.admission import Job, Limits, make_sequences, validate
from jllm.engine.inputs import pack
from jllm.engine.logprobs import (
    collect_prompt_logprobs,
    next_tokens,
    token_logprobs,
    wants_prompt_logprobs,
    wants_sampler,
)
from jllm.engine.programs import (
    ProgramOptions,
    Programs,
    describe_state,
    init_state,
)
from jllm.engine.state import row_fields
from jllm.errors import InvalidRequestError
from jllm.metrics import EngineMetrics
from jllm.models.base import Model, Weights
from jllm.sampling.logprobs import FINITE, ResultLayout
from jllm.sampling.rules import RowRules, RuleLayout, pack_rules
from jllm.scheduler.plan import ScheduledRow, StepPlan
from jllm.scheduler.request import Request
from jllm.scheduler.scheduler import RowResult, Scheduler, SequenceUpdate
from jllm.types import EngineRequest, TokenOutput


@dataclasses.dataclass(frozen=True, slots=True)
class InFlight:
    """A launched step whose tokens have not been read.

    Attributes:
        plan: What it computes.
        jobs: The sequences of its rows; some may end before it is read.
        packed: Its result on the device, on its way to the host.
        has_logprobs: Whether the result is the sampler program's.
        prompt_packed: Prompt log-probabilities of all tokens of the step.
    """

    plan: StepPlan
    jobs: list[Job]
    packed: jax.Array
    has_logprobs: bool
    prompt_packed: jax.Array | None


@dataclasses.dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the layers above need to know of the model's files.

    Attributes:
        path: Folder of the checkpoint.
        default_sampling: Sampling parameters that the model recommends.
    """

    path: Path
    default_sampling: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is put together from; see `jllm.engine.create`.

    Attributes:
        model: The network.
        weights: Its arrays.
        scheduler: Host policy, with an empty pool.
        programs: Compiled steps.
        options: Their sizes.
        limits: Bounds of requests.
        info: Where the model came from.
        place: Where inputs go.
        overlap: Whether a step is launched before the last one's tokens are read.
        seed: Seed of the seeds of requests without one.
    """

    model: Model
    weights: Weights
    scheduler: Scheduler
    programs: Programs
    options: ProgramOptions
    limits: Limits
    info: ModelInfo
    place: NamedSharding
    overlap: bool
    seed: int


class Engine:
    """Adds and aborts requests, and computes them step by step.

    Not thread-safe: one thread calls it.
    """

    def __init__(self, parts: EngineParts) -> None:
        """Makes an empty device state."""
        self._parts = parts
        self._scheduler = parts.scheduler
        description = describe_state(parts.model, parts.options, parts.place)
        self._state = init_state(description)
        self._in_flight: InFlight | None = None
        self._open: dict[str, list[Request]] = {}
        self._next_id = 0
        self._seeds = np.random.default_rng(parts.seed)
        self._rule_layout = RuleLayout(parts.model.padded_vocab_size)
        self._neutral_rules = pack_rules(self._rule_layout, RowRules())
        self._rules = np.tile(self._neutral_rules, (parts.options.table_rows, 1))
        self._device_rules: jax.Array | None = None
        self._result_layout = ResultLayout(parts.options.num_logprobs)
        self.metrics = EngineMetrics()

    @property
    def limits(self) -> Limits:
        """Bounds of requests."""
        return self._parts.limits

    @property
    def info(self) -> ModelInfo:
        """Where the model came from."""
        return self._parts.info

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def is_open(self, request_id: str) -> bool:
        """Whether a request of that id has not ended."""
        return request_id in self._open

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler, to look at."""
        return self._scheduler

    @property
    def programs(self) -> Programs:
        """The compiled programs, to wait for or to look at."""
        return self._parts.programs

    @property
    def state(self) -> Any:
        """The device state; valid until the next step, which donates it."""
        return self._state

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_unfinished or self._in_flight is not None

    def add(self, request: EngineRequest) -> None:
        """Queues a request.

        Raises:
            InvalidRequestError: A field is wrong, or the id is in use.
            ContextTooLongError: It can never fit.
        """
        if request.request_id in self._open:
            raise InvalidRequestError(
                f"request_id={request.request_id!r} is in use", parameter="request_id"
            )
        validate(request, self._parts.limits)
        seed = request.params.seed
        if seed is None:
            seed = int(self._seeds.integers(2**63))
        sequences = make_sequences(
            request,
            self._parts.limits,
            self._rule_layout,
            seed=seed,
            first_id=self._next_id,
            arrival=self._next_id,
        )
        for sequence in sequences:
            self._scheduler.add(sequence)
        self._next_id += len(sequences)
        self._open[request.request_id] = sequences

    def abort(self, request_id: str) -> None:
        """Ends a request and frees its blocks; unknown ids are ignored."""
        self._scheduler.abort(request_id)
        self._open.pop(request_id, None)

    def abort_sequence(self, request_id: str, index: int) -> None:
        """Ends one of the sequences of a request, the others go on."""
        for sequence in self._open.get(request_id, ()):
            if sequence.index == index:
                self._scheduler.abort_sequence(sequence)

    def step(self) -> list[TokenOutput]:
        """Launches the next step and returns the tokens of the one before it."""
        plan = self._scheduler.schedule()
        launched = self._launch(plan) if plan else None
        outputs = self._collect(self._in_flight) if self._in_flight else []
        self._in_flight = launched
        if launched and not self._parts.overlap:
            outputs += self._collect(launched)
            self._in_flight = None
        return outputs

    def wait_until_compiled(self) -> None:
        """Returns when the programs of all sizes are compiled."""
        self._parts.programs.wait()

    def reset_prefix_cache(self) -> bool:
        """Forgets cached prefixes; False while requests are running."""
        return self._scheduler.reset_prefix_cache()

    def close(self) -> None:
        """Drops the device state and ends background compilation."""
        self._parts.programs.close()
        self._in_flight = None
        self._open.clear()

    def _launch(self, plan: StepPlan) -> InFlight:
        """Packs and dispatches a step; returns before it is computed."""
        began = time.perf_counter()
        parts, jobs = self._parts, self._jobs(plan)
        wants_prompt = wants_prompt_logprobs(plan, jobs)
        if wants_prompt:
            layout, program = parts.programs.largest_prefill()
        else:
            layout, program = parts.programs.step(
                is_decode=plan.is_decode,
                num_rows=len(plan.rows),
                num_tokens=plan.num_tokens,
            )
        vector = self._upload(pack(plan, layout, self._start_fields))
        self._state, result = program(parts.weights, self._state, vector)
        self.metrics.dispatches += 1
        packed, prompt_packed = result.packed, None
        has_logprobs = wants_prompt or wants_sampler(plan, jobs)
        if has_logprobs:
            self._place_rules(plan, jobs)
            self.metrics.dispatches += 1
        if wants_prompt:
            targets = self._upload(next_tokens(plan, jobs, layout.num_tokens))
            self._state, (packed, prompt_packed) = parts.programs.prompt_logprobs()(
                parts.weights, self._state, result, targets, self._device_rules
            )
            prompt_packed.copy_to_host_async()
        elif has_logprobs:
            self._state, packed = parts.programs.sampler(layout.num_rows)(
                self._state, result.logits, result.sampled_rows, self._device_rules
            )
        packed.copy_to_host_async()
        self.metrics.kernel_fallbacks = parts.programs.num_fallbacks
        self.metrics.steps += 1
        self.metrics.scheduled_tokens += plan.num_tokens
        self.metrics.launch_seconds += time.perf_counter() - began
        return InFlight(plan, jobs, packed, has_logprobs, prompt_packed)

    def _collect(self, flight: InFlight) -> list[TokenOutput]:
        """Waits for a step, commits its tokens and reports them."""
        packed = np.asarray(flight.packed)
        self.metrics.device_to_host_copies += 1
        if flight.prompt_packed is not None:
            prompt_packed = np.asarray(flight.prompt_packed)
            self.metrics.device_to_host_copies += 1
            collect_prompt_logprobs(
                flight.plan, flight.jobs, self._result_layout, prompt_packed
            )
        tokens, flags = packed[:, 0].tolist(), packed[:, 1].tolist()
        results = [
            RowResult(tokens[i], bool(flags[i] & FINITE))
            for i in range(len(flight.plan.rows))
        ]
        updates = self._scheduler.commit(flight.plan, results)
        outputs = [self._output(update, flight, packed) for update in updates]
        self._forget_finished(updates)
        return outputs

    def _jobs(self, plan: StepPlan) -> list[Job]:
        get = self._scheduler.get
        return [get(row.sequence_id).payload for row in plan.rows]

    def _start_fields(self, row: ScheduledRow) -> np.ndarray:
        job: Job = self._scheduler.get(row.sequence_id).payload
        return row_fields(
            job.request,
            position=row.position,
            end=job.end,
            seed=job.seed,
            stop_token_ids=job.stop_token_ids,
        )

    def _upload(self, vector: np.ndarray) -> jax.Array:
        self.metrics.host_to_device_copies += 1
        return jax.device_put(vector, self._parts.place)

    def _place_rules(self, plan: StepPlan, jobs: list[Job]) -> None:
        """Uploads the rule table if a row's rules are not the ones on the device."""
        changed = self._device_rules is None
        for row, job in zip(plan.rows, jobs, strict=True):
            rules = self._neutral_rules if job.rules is None else job.rules
            if not np.array_equal(self._rules[row.row], rules):
                self._rules[row.row] = rules
                changed = True
        if changed:
            # A copy, since a transfer may alias the buffer that is changed next time.
            self._device_rules = self._upload(self._rules.copy())

    def _output(
        self, update: SequenceUpdate, flight: InFlight, packed: np.ndarray
    ) -> TokenOutput:
        sequence = update.request
        job: Job = sequence.payload
        params = job.request.params
        logprobs = None
        wants = params.logprobs is not None or params.logprob_token_ids
        if flight.has_logprobs and wants and update.token_id is not None:
            entry = self._result_layout.unpack(packed[update.plan_index])
            ids = tuple(params.logprob_token_ids or ())
            logprobs = (token_logprobs(entry, update.token_id, params.logprobs, ids),)
        prompt = None
        if job.prompt_logprobs is not None and sequence.num_output_tokens <= 1:
            prompt = tuple(entry for entry in job.prompt_logprobs if entry)
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
            error="the model's output was not finite" if failed else None,
        )

    def _forget_finished(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            if update.finish_reason is not None:
                request_id = update.request.request_id
                sequences = self._open.get(request_id)
                if sequences and all(s.finish_reason for s in sequences):
                    del self._open[request_id]
