"""The engine: requests in, tokens out; sole holder of weights and device state."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jllm.engine.admission import Job, Limits, make_sequences, validate
from jllm.engine.arguments import ArgumentTables
from jllm.engine.builder import ProgramBuilder
from jllm.engine.executor import Executor
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
from jllm.engine.probing import Probing
from jllm.engine.programs import ProgramOptions, Programs
from jllm.engine.results import InFlight, step_outputs
from jllm.engine.stages import Stages
from jllm.engine.state import row_fields
from jllm.errors import InvalidRequestError
from jllm.metrics import EngineStats
from jllm.models.base import Model, Weights
from jllm.sampling.logprobs import FINITE, ResultLayout
from jllm.sampling.rules import RowRules, RuleLayout, pack_rules
from jllm.scheduler.launched import SequenceUpdate
from jllm.scheduler.plan import ScheduledRow, StepPlan
from jllm.scheduler.request import Request
from jllm.scheduler.scheduler import Scheduler
from jllm.types import EngineRequest, StepOutputs


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
        executor: Its arrays, the device state and the programs.
        scheduler: Host policy, with an empty pool.
        options: Sizes of the programs.
        limits: Bounds of requests.
        info: Where the model came from.
        overlap: Whether a step is launched before the last one's tokens are read.
        seed: Seed of the seeds of requests without one.
    """

    model: Model
    executor: Executor
    scheduler: Scheduler
    options: ProgramOptions
    limits: Limits
    info: ModelInfo
    overlap: bool
    seed: int


class Engine:
    """Adds and aborts requests, and computes them step by step.

    Not thread-safe: one thread calls it.
    """

    def __init__(self, parts: EngineParts) -> None:
        """Begins without requests."""
        self._parts = parts
        self._scheduler = parts.scheduler
        self._executor = parts.executor
        self.metrics = parts.executor.metrics
        self._stages = Stages(parts.scheduler.config.num_stages)
        self._in_flight: InFlight | None = None
        self._open: dict[str, list[Request]] = {}
        self._next_id = 0
        self._seeds = np.random.default_rng(parts.seed)
        self._rule_layout = RuleLayout(parts.model.padded_vocab_size)
        self._neutral_rules = pack_rules(self._rule_layout, RowRules())
        self._rules = np.tile(self._neutral_rules, (parts.options.table_rows, 1))
        self._arguments = ArgumentTables(
            parts.limits.extra_args, parts.options.table_rows, self._executor.upload
        )
        self._result_layout = ResultLayout(parts.options.num_logprobs)
        self._probing = Probing(
            lambda: ProgramBuilder(
                parts.model, parts.options, self.weights, self._executor.place
            ),
            parts.options,
            parts.limits.activations,
            self._executor.upload,
        )

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
        return self._executor.programs

    @property
    def executor(self) -> Executor:
        """What runs the programs, to look at."""
        return self._executor

    @property
    def state(self) -> Any:
        """The device state, until the next step donates it; None once closed."""
        return self._executor.state

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would do anything."""
        is_busy = self._in_flight is not None or self._stages.are_busy
        return is_busy or self._scheduler.has_unfinished

    def prepare(self, requests: Sequence[EngineRequest]) -> None:
        """Compiles for requests that capture or edit, from any thread, before `add`."""
        self._probing.prepare(requests)

    def release(self, request_id: str) -> None:
        """Forgets a prepared request that will not be added, from any thread."""
        self._probing.release(request_id)

    def add(self, request: EngineRequest) -> None:
        """Queues a request; a probed one that was not prepared is compiled for.

        Raises:
            InvalidRequestError: A field is wrong, or the id is in use.
            ContextTooLongError: It can never fit.
        """
        if request.request_id in self._open:
            raise InvalidRequestError(
                f"request_id={request.request_id!r} is in use", parameter="request_id"
            )
        validate(request, self._parts.limits)
        self._probing.prepare([request])
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
        self._probing.release(request_id)

    def abort_sequence(self, request_id: str, index: int) -> None:
        """Ends one of the sequences of a request, the others go on."""
        for sequence in self._open.get(request_id, ()):
            if sequence.index == index:
                self._scheduler.abort_sequence(sequence)
        self._forget_if_ended(request_id)

    def step(self) -> StepOutputs:
        """Launches the next step and returns the tokens of the one before it."""
        plan = self._scheduler.schedule(self.programs.token_limit)
        launched = self._launch(plan) if plan else None
        outputs = self._collect(self._in_flight) if self._in_flight else StepOutputs()
        if launched and launched.is_unsampled:
            # Grammars had to see the tokens before, while the device computed scores.
            launched = self._sample(launched)
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
        self.programs.wait()

    @property
    def weights(self) -> Weights:
        """The tree of arrays that the next step computes with."""
        return self._executor.weights

    def update_weights(self, weights: Weights) -> None:
        """Takes other weights for the steps from now on.

        Sequences that run go on with what they have cached, which nobody else will use.
        In a pipeline the new ones hold for the layers that a token has still to pass.

        Raises:
            ConfigError: The tree differs from `weights` in structure, shapes or types.
        """
        self._executor.update_weights(weights)
        self._scheduler.start_revision()

    def reset_prefix_cache(self) -> bool:
        """Forgets cached prefixes; False while requests are running."""
        return self._scheduler.reset_prefix_cache()

    def close(self) -> None:
        """Ends open requests and background compilation, drops the device state."""
        for request_id in tuple(self._open):
            self.abort(request_id)
        self._in_flight = None
        self._stages = Stages(self._scheduler.config.num_stages)
        self._executor.close()

    def _launch(self, plan: StepPlan) -> InFlight:
        """Packs and dispatches a step; returns before it is computed.

        In a pipeline what is launched is not what comes out. The sampler program of a
        step with grammars is left to the caller.
        """
        began = time.perf_counter()
        programs, entering, stages = self.programs, plan, self._stages
        stages.enter(plan, self._jobs(plan))
        plan, jobs = stages.oldest
        wants_prompt = wants_prompt_logprobs(plan, jobs)
        has_logprobs = wants_prompt or wants_sampler(plan, jobs)
        probed = self._probing.program(plan, jobs)
        if probed:
            layout, program = probed
        elif wants_prompt:
            layout, program = programs.largest_prefill()
        else:
            layout, program = programs.step(
                is_decode=stages.decode_only,
                num_rows=stages.most_rows,
                num_tokens=stages.most_tokens,
                has_rules=has_logprobs,
            )
        vector = pack(entering, layout, self._start_fields)
        packed = self._executor.step(layout, program, vector)
        flight = InFlight(plan, jobs, packed, has_logprobs, has_logprobs, layout)
        flight = self._probing.capture(self._pool(flight), self._executor.captured)
        if not has_logprobs:
            packed.copy_to_host_async()
        elif not wants_grammars(plan, jobs):
            flight = self._sample(flight)
        self.metrics.kernel_fallbacks = programs.num_fallbacks
        self.metrics.steps += 1
        self.metrics.idle_stage_steps += stages.num_idle
        stages.leave()
        self._count_tokens(entering, layout)
        self.metrics.launch_seconds += time.perf_counter() - began
        return flight

    def _pool(self, flight: InFlight) -> InFlight:
        """Dispatches the sums of hidden states, in a step with pooled prompts."""
        plan, layout = flight.plan, flight.layout
        chunks = flight.jobs[len(plan.decoding) :]
        segments = claim_segments(plan, [job.pooled for job in chunks])
        if not segments:
            return flight
        owners = pool_owners(segments, layout.num_rows, layout.num_tokens)
        sums = self._executor.pool(layout.num_tokens, owners)
        sums.copy_to_host_async()
        return dataclasses.replace(flight, segments=segments, sums=sums)

    def _sample(self, flight: InFlight) -> InFlight:
        """Dispatches the second program of a step, with rules and grammars."""
        plan, jobs, num_rows = flight.plan, flight.jobs, flight.layout.num_rows
        self._place_rules(plan, jobs)
        arguments = self._arguments.place(
            plan.table_rows, [job.extra_args for job in jobs]
        )
        masks = self._masks(flight)
        of_prompt = None
        if wants_prompt_logprobs(plan, jobs):
            targets = next_tokens(plan, jobs, flight.layout.num_tokens)
            packed, of_prompt = self._executor.sample_prompt(
                num_rows, targets, masks, arguments
            )
            of_prompt.copy_to_host_async()
        else:
            packed = self._executor.sample(num_rows, masks, arguments)
        packed.copy_to_host_async()
        return dataclasses.replace(
            flight, packed=packed, prompt_packed=of_prompt, is_unsampled=False
        )

    def _masks(self, flight: InFlight) -> np.ndarray | None:
        """What the grammars of a step allow, if it has any."""
        plan, jobs, num_rows = flight.plan, flight.jobs, flight.layout.num_rows
        if not wants_grammars(plan, jobs):
            return None
        began = time.perf_counter()
        masks = pack_masks(plan, jobs, num_rows, self._rule_layout.sizes["allowed"])
        self.metrics.grammar_seconds += time.perf_counter() - began
        return masks

    def _count_tokens(self, plan: StepPlan, layout: InputLayout) -> None:
        metrics = self.metrics
        metrics.scheduled_rows += plan.num_rows
        metrics.scheduled_tokens += plan.num_tokens
        metrics.padded_tokens += layout.num_tokens
        metrics.step_tokens.observe(plan.num_tokens)
        metrics.mixed_steps += 0 < len(plan.decoding) < plan.num_rows

    def _collect(self, flight: InFlight) -> StepOutputs:
        """Waits for a step, commits its tokens and reports them."""
        if not flight.plan.num_rows:  # nothing has come out of the pipeline
            return StepOutputs()
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
        if flight.captures is not None:
            self.metrics.device_to_host_copies += flight.captures.file()
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
        lost = self._scheduler.lost_rows(flight.plan)
        complete = push_tokens(flight.plan, flight.jobs, tokens, lost)
        self.metrics.grammar_seconds += time.perf_counter() - began
        return complete

    def _jobs(self, plan: StepPlan) -> list[Job]:
        if not plan.num_rows:
            return []
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

    def _place_rules(self, plan: StepPlan, jobs: list[Job]) -> None:
        """Uploads the rule table if a row's rules are not the ones on the device."""
        changed = not self._executor.has_rules
        for row, job in zip(plan.table_rows, jobs, strict=True):
            rules = self._neutral_rules if job.rules is None else job.rules
            if not np.array_equal(self._rules[row], rules):
                self._rules[row] = rules
                changed = True
        if changed:
            # A copy, since a transfer may alias the buffer that is changed next time.
            self._executor.place_rules(self._rules.copy())

    def _forget_finished(self, updates: Sequence[SequenceUpdate]) -> None:
        for update in updates:
            if update.finish_reason is not None:
                self._forget_if_ended(update.request.request_id)

    def _forget_if_ended(self, request_id: str) -> None:
        sequences = self._open.get(request_id)
        if sequences and all(sequence.finish_reason for sequence in sequences):
            del self._open[request_id]
            self._probing.release(request_id)
