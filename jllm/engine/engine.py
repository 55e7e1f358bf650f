"""The engine: requests in, tokens out; sole holder of weights and device state."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jllm.engine.admission import Job, Limits, make_sequences, validate
from jllm.engine.grammars import pack_masks, push_tokens, wants_grammars
from jllm.engine.inputs import InputLayout, pack
from jllm.engine.logprobs import (
    collect_prompt_logprobs,
    next_tokens,
    wants_prompt_logprobs,
    wants_sampler,
)
from jllm.engine.memory import group_block_bytes
from jllm.engine.pooling import add_sums, claim_segments, pool_owners
from jllm.engine.programs import ProgramOptions, Programs
from jllm.engine.results import InFlight, step_outputs
from jllm.engine.state import EngineState, row_fields
from jllm.engine.steps import SamplerInput, StepResult
from jllm.errors import InvalidRequestError
from jllm.metrics import EngineMetrics, EngineStats
from jllm.models.base import Model, Weights
from jllm.sampling.logprobs import FINITE, ResultLayout
from jllm.sampling.rules import RowRules, RuleLayout, pack_rules
from jllm.scheduler.launched import SequenceUpdate
from jllm.scheduler.plan import ScheduledRow, StepPlan
from jllm.scheduler.request import Request
from jllm.scheduler.scheduler import Scheduler
from jllm.types import EngineRequest, StepOutputs
from jllm.weights.update import placed_like


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
        self._state: EngineState | None = parts.programs.init_state()
        self._in_flight: InFlight | None = None
        self._open: dict[str, list[Request]] = {}
        self._next_id = 0
        self._seeds = np.random.default_rng(parts.seed)
        self._rule_layout = RuleLayout(parts.model.padded_vocab_size)
        self._neutral_rules = pack_rules(self._rule_layout, RowRules())
        self._rules = np.tile(self._neutral_rules, (parts.options.table_rows, 1))
        self._device_rules: jax.Array | None = None
        self._no_masks: dict[int, jax.Array] = {}
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
        """The device state, until the next step donates it; None once closed."""
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
        self._forget_if_ended(request_id)

    def step(self) -> StepOutputs:
        """Launches the next step and returns the tokens of the one before it."""
        plan = self._scheduler.schedule()
        launched = self._launch(plan) if plan else None
        outputs = self._collect(self._in_flight) if self._in_flight else StepOutputs()
        if launched and launched.unsampled:
            # Grammars had to see the tokens before, while the device computed scores.
            launched = self._sample(launched, launched.unsampled)
        self._in_flight = launched
        if launched and not self._parts.overlap:
            outputs = self._collect(launched)
            self._in_flight = None
        return outputs

    def stats(self) -> EngineStats:
        """What it is doing and has done; may be called from any thread."""
        scheduler, steps = self._scheduler, self.metrics.step_tokens
        sizes = group_block_bytes(self._parts.model, self._parts.options.block_size)
        pools = tuple(zip(scheduler.pools, sizes, strict=True))
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            block_states=b"".join(pool.states() for pool, _ in pools),
            kv_bytes=sum(pool.num_blocks * size for pool, size in pools),
            kv_bytes_used=sum(pool.num_used * size for pool, size in pools),
            num_prefix_queries=scheduler.num_prefix_queries,
            num_prefix_hits=scheduler.num_prefix_hits,
            num_preemptions=scheduler.num_preemptions,
            block_size=self._parts.options.block_size,
            step_counts=tuple(steps.counts),
            step_tokens=steps.total,
        )

    def wait_until_compiled(self) -> None:
        """Returns when the programs of all sizes are compiled."""
        self._parts.programs.wait()

    @property
    def weights(self) -> Weights:
        """The tree of arrays that the next step computes with."""
        return self._parts.weights

    def update_weights(self, weights: Weights) -> None:
        """Takes other weights for the steps from now on.

        Sequences that run go on with what they have cached, which nobody else will use.

        Raises:
            ConfigError: The tree differs from `weights` in structure, shapes or types.
        """
        placed = placed_like(weights, self._parts.weights)
        self._parts = dataclasses.replace(self._parts, weights=placed)
        self._scheduler.start_revision()

    def reset_prefix_cache(self) -> bool:
        """Forgets cached prefixes; False while requests are running."""
        return self._scheduler.reset_prefix_cache()

    def close(self) -> None:
        """Ends open requests and background compilation, drops the device state."""
        for request_id in tuple(self._open):
            self.abort(request_id)
        self._parts.programs.close()
        self._in_flight = self._state = None

    def _launch(self, plan: StepPlan) -> InFlight:
        """Packs and dispatches a step; returns before it is computed.

        The sampler program of a step with grammars is left to the caller.
        """
        began = time.perf_counter()
        parts, jobs = self._parts, self._jobs(plan)
        wants_prompt = wants_prompt_logprobs(plan, jobs)
        has_logprobs = wants_prompt or wants_sampler(plan, jobs)
        if wants_prompt:
            layout, program = parts.programs.largest_prefill()
        else:
            layout, program = parts.programs.step(
                is_decode=plan.is_decode,
                num_rows=plan.num_rows,
                num_tokens=plan.num_tokens,
                has_rules=has_logprobs,
            )
        vector = pack(plan, layout, self._start_fields)
        # Copied by the call itself, which costs a tenth of a `device_put` before it.
        self._state, result = program(parts.weights, self._state, vector)
        self.metrics.host_to_device_copies += 1
        self.metrics.dispatches += 1
        unsampled = result if has_logprobs else None
        flight = InFlight(plan, jobs, result.packed, has_logprobs, unsampled, layout)
        flight = self._pool(flight, result)
        if not has_logprobs:
            result.packed.copy_to_host_async()
        elif not wants_grammars(plan, jobs):
            flight = self._sample(flight, result)
        self.metrics.kernel_fallbacks = parts.programs.num_fallbacks
        self.metrics.steps += 1
        self._count_tokens(plan, layout)
        self.metrics.launch_seconds += time.perf_counter() - began
        return flight

    def _pool(self, flight: InFlight, result: StepResult) -> InFlight:
        """Dispatches the sums of hidden states, in a step with pooled prompts."""
        plan, layout = flight.plan, flight.layout
        chunks = flight.jobs[len(plan.decoding) :]
        segments = claim_segments(plan, [job.pooled for job in chunks])
        if not segments:
            return flight
        owners = pool_owners(segments, layout.num_rows, layout.num_tokens)
        program = self._parts.programs.pool(layout.num_tokens)
        sums = program(result.hidden, self._upload(owners))
        self.metrics.dispatches += 1
        sums.copy_to_host_async()
        return dataclasses.replace(flight, segments=segments, sums=sums)

    def _sample(self, flight: InFlight, result: StepResult) -> InFlight:
        """Dispatches the second program of a step, with rules and grammars."""
        parts, plan, jobs = self._parts, flight.plan, flight.jobs
        self._place_rules(plan, jobs)
        inputs = SamplerInput(self._device_rules, self._masks(flight))
        self.metrics.dispatches += 1
        prompt_packed = None
        if wants_prompt_logprobs(plan, jobs):
            targets = self._upload(next_tokens(plan, jobs, flight.layout.num_tokens))
            self._state, (packed, prompt_packed) = parts.programs.prompt_logprobs()(
                parts.weights, self._state, result, targets, inputs
            )
            prompt_packed.copy_to_host_async()
        else:
            self._state, packed = parts.programs.sampler(flight.layout.num_rows)(
                self._state, result.logits, result.sampled_rows, inputs
            )
        packed.copy_to_host_async()
        return dataclasses.replace(
            flight, packed=packed, prompt_packed=prompt_packed, unsampled=None
        )

    def _masks(self, flight: InFlight) -> jax.Array:
        """What the grammars of a step allow; without any, an array made once."""
        num_rows = flight.layout.num_rows
        num_words = self._rule_layout.sizes["allowed"]
        if not wants_grammars(flight.plan, flight.jobs):
            if num_rows not in self._no_masks:
                ones = np.full((num_rows, num_words), -1, np.int32)
                self._no_masks[num_rows] = jax.device_put(ones, self._parts.place)
            return self._no_masks[num_rows]
        began = time.perf_counter()
        masks = pack_masks(flight.plan, flight.jobs, num_rows, num_words)
        self.metrics.grammar_seconds += time.perf_counter() - began
        return self._upload(masks)

    def _count_tokens(self, plan: StepPlan, layout: InputLayout) -> None:
        metrics = self.metrics
        metrics.scheduled_rows += plan.num_rows
        metrics.scheduled_tokens += plan.num_tokens
        metrics.padded_tokens += layout.num_tokens
        metrics.step_tokens.observe(plan.num_tokens)
        metrics.mixed_steps += 0 < len(plan.decoding) < plan.num_rows

    def _collect(self, flight: InFlight) -> StepOutputs:
        """Waits for a step, commits its tokens and reports them."""
        packed = np.asarray(flight.packed)
        self.metrics.device_to_host_copies += 1
        if flight.prompt_packed is not None:
            prompt_packed = np.asarray(flight.prompt_packed)
            self.metrics.device_to_host_copies += 1
            collect_prompt_logprobs(
                flight.plan, flight.jobs, self._result_layout, prompt_packed
            )
        if flight.sums is not None:
            add_sums(flight.segments, np.asarray(flight.sums))
            self.metrics.device_to_host_copies += 1
        results = packed[: flight.plan.num_rows]
        tokens = results[:, 0].tolist()
        failed = np.flatnonzero(results[:, 1] & FINITE == 0).tolist()
        complete: frozenset[int] = frozenset()
        if flight.has_logprobs and wants_grammars(flight.plan, flight.jobs):
            complete = self._push_tokens(flight, tokens)
            failed += [i for i, job in enumerate(flight.jobs) if job.failure]
        updates = self._scheduler.commit(flight.plan, tokens, failed, complete)
        outputs = step_outputs(updates, flight, packed, self._result_layout)
        self._forget_finished(updates.others)
        return outputs

    def _push_tokens(self, flight: InFlight, tokens: list[int]) -> frozenset[int]:
        """Leads grammars on; returns the rows for which nothing can follow."""
        began = time.perf_counter()
        complete = push_tokens(flight.plan, flight.jobs, tokens)
        self.metrics.grammar_seconds += time.perf_counter() - began
        return complete

    def _jobs(self, plan: StepPlan) -> list[Job]:
        return [request.payload for request in self._scheduler.requests_of(plan)]

    def _start_fields(self, row: ScheduledRow) -> np.ndarray:
        job: Job = self._scheduler.get(row.sequence_id).payload
        job.scheduled_time = job.scheduled_time or time.monotonic()
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
        for row, job in zip(plan.table_rows, jobs, strict=True):
            rules = self._neutral_rules if job.rules is None else job.rules
            if not np.array_equal(self._rules[row], rules):
                self._rules[row] = rules
                changed = True
        if changed:
            # A copy, since a transfer may alias the buffer that is changed next time.
            self._device_rules = self._upload(self._rules.copy())

    def _forget_finished(self, updates: Sequence[SequenceUpdate]) -> None:
        for update in updates:
            if update.finish_reason is not None:
                self._forget_if_ended(update.request.request_id)

    def _forget_if_ended(self, request_id: str) -> None:
        sequences = self._open.get(request_id)
        if sequences and all(sequence.finish_reason for sequence in sequences):
            del self._open[request_id]
