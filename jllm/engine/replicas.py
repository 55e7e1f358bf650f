"""Data parallelism: independent engines behind the interface of one."""

import asyncio
import dataclasses
from collections.abc import Sequence
from itertools import chain

from jllm.engine.admission import Limits
from jllm.engine.engine import Engine, ModelInfo
from jllm.metrics import EngineStats
from jllm.models.base import Weights
from jllm.scheduler.routing import ReplicaRouter
from jllm.types import EngineRequest, StepOutputs


class Replicas:
    """Sends each request to one of several replicas; see `ReplicaRouter`.

    Replicas share no state: each has its own devices, weights, pool and scheduler.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        """Takes over engines of the same model, at least one."""
        self._engines = list(engines)
        self._owner: dict[str, Engine] = {}
        self._prepared: dict[str, Engine] = {}
        pool = self._engines[0].scheduler.config
        cached = pool.num_blocks if pool.enable_prefix_caching else 0
        self._router = ReplicaRouter(len(self._engines), pool.block_size, cached)

    @property
    def limits(self) -> Limits:
        """Bounds of requests; the same for all replicas."""
        return self._engines[0].limits

    @property
    def info(self) -> ModelInfo:
        """Where the model came from."""
        return self._engines[0].info

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The replicas, to look at."""
        return tuple(self._engines)

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would do anything."""
        return any(engine.has_unfinished for engine in self._engines)

    def prepare(self, requests: Sequence[EngineRequest]) -> None:
        """Shares requests that capture or edit out; see `Engine.prepare`."""
        engines = sorted(self._engines, key=lambda engine: engine.num_open)
        shares = [requests[i :: len(engines)] for i in range(len(engines))]
        for engine, share in zip(engines, shares, strict=True):
            engine.prepare(share)
            self._prepared |= {request.request_id: engine for request in share}

    def release(self, request_id: str) -> None:
        """Forgets a prepared request that will not be added."""
        owner = self._prepared.pop(request_id, None)
        if owner is not None:
            owner.release(request_id)

    def add(self, request: EngineRequest) -> None:
        """Queues a request; see `Engine.add`."""
        owner = self._owner.get(request.request_id)
        if owner is None or not owner.is_open(request.request_id):
            owner = self._prepared.get(request.request_id)
        if owner is None:
            loads = [engine.num_open for engine in self._engines]
            prompt, salt = request.prompt_token_ids, request.cache_salt
            owner = self._engines[self._router.route(prompt, loads, salt)]
        owner.add(request)
        self._prepared.pop(request.request_id, None)
        self._owner[request.request_id] = owner

    def abort(self, request_id: str) -> None:
        """Ends a request; unknown ids are ignored."""
        owner = self._owner.pop(request_id, None)
        if owner is not None:
            owner.abort(request_id)

    def abort_sequence(self, request_id: str, index: int) -> None:
        """Ends one of the sequences of a request, the others go on."""
        owner = self._owner.get(request_id)
        if owner is not None:
            owner.abort_sequence(request_id, index)

    def step(self) -> StepOutputs:
        """Steps every replica; while one is waited for, the others compute."""
        steps = [engine.step() for engine in self._engines]
        outputs = StepOutputs(
            keys=list(chain.from_iterable(step.keys for step in steps)),
            token_ids=list(chain.from_iterable(step.token_ids for step in steps)),
            others=list(chain.from_iterable(step.others for step in steps)),
        )
        for output in outputs.others:
            owner = self._owner.get(output.request_id)
            if owner is not None and not owner.is_open(output.request_id):
                del self._owner[output.request_id]
        return outputs

    def stats(self) -> EngineStats:
        """Sums over the replicas."""
        all_stats = [engine.stats() for engine in self._engines]
        sums = {
            field.name: sum(getattr(stats, field.name) for stats in all_stats)
            for field in dataclasses.fields(EngineStats)
            if field.name not in ("block_states", "step_counts")
        }
        counts = zip(*(stats.step_counts for stats in all_stats), strict=True)
        return EngineStats(
            **sums | {"block_size": all_stats[0].block_size},
            block_states=b"".join(stats.block_states for stats in all_stats),
            step_counts=tuple(map(sum, counts)),
        )

    def wait_until_compiled(self) -> None:
        """Returns when the programs of all replicas are compiled."""
        for engine in self._engines:
            engine.wait_until_compiled()

    @property
    def weights(self) -> Weights:
        """The tree of arrays of the first replica."""
        return self._engines[0].weights

    def update_weights(self, weights: Weights) -> None:
        """Gives every replica other weights; see `Engine.update_weights`."""
        for engine in self._engines:
            engine.update_weights(weights)
        self._router.forget()

    def reset_prefix_cache(self) -> bool:
        """Forgets cached prefixes of all replicas."""
        results = [engine.reset_prefix_cache() for engine in self._engines]
        self._router.forget()
        return all(results)

    def close(self) -> None:
        """Closes every replica."""
        for engine in self._engines:
            engine.close()


async def prepare_probed(engine: Engine | Replicas, request: EngineRequest) -> None:
    """Compiles what a request captures and edits, in a thread of its own."""
    preparing = asyncio.ensure_future(asyncio.to_thread(engine.prepare, [request]))
    try:
        await asyncio.shield(preparing)
    except asyncio.CancelledError:
        # The thread goes on to its end.
        preparing.add_done_callback(lambda _: engine.release(request.request_id))
        raise
