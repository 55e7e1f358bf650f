"""Data parallelism: independent engines behind the interface of one."""

import dataclasses
from collections.abc import Sequence
from itertools import chain

from jllm.engine.admission import Limits
from jllm.engine.engine import Engine, ModelInfo
from jllm.engine.routing import Route, Router, prompt_pieces
from jllm.metrics import EngineStats
from jllm.models.base import Weights
from jllm.types import EngineRequest, StepOutputs


class Replicas:
    """Sends each request where most of its prompt is cached, unless that one is busy.

    Replicas share no state: each has its own devices, weights, pool and scheduler.
    """

    def __init__(
        self, engines: Sequence[Engine], *, caches_prefixes: bool = True
    ) -> None:
        """Takes over engines of the same model, at least one.

        Args:
            engines: The replicas.
            caches_prefixes: Whether they do; else the load alone counts.
        """
        self._engines = list(engines)
        stats = [engine.stats() for engine in engines] if caches_prefixes else []
        tokens = [len(s.block_states) * s.block_size for s in stats]
        self._router = Router(tokens or [0] * len(engines))
        self._routes: dict[str, Route] = {}

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

    def add(self, request: EngineRequest) -> None:
        """Queues a request; see `Engine.add`."""
        owner = self._owner(request.request_id)
        if owner is not None:
            if owner.is_open(request.request_id):
                # It refuses a second request of the same id.
                owner.add(request)
            self._end(request.request_id)
        prompt = request.prompt_token_ids
        route = self._router.send(
            prompt_pieces(prompt, request.cache_salt), len(prompt)
        )
        try:
            self._engines[route.replica].add(request)
        except BaseException:
            self._router.end(route)
            raise
        self._routes[request.request_id] = route

    def abort(self, request_id: str) -> None:
        """Ends a request; unknown ids are ignored."""
        owner = self._owner(request_id)
        if owner is not None:
            owner.abort(request_id)
            self._end(request_id)

    def abort_sequence(self, request_id: str, index: int) -> None:
        """Ends one of the sequences of a request, the others go on."""
        owner = self._owner(request_id)
        if owner is not None:
            owner.abort_sequence(request_id, index)

    def _owner(self, request_id: str) -> Engine | None:
        """The replica that has a request."""
        route = self._routes.get(request_id)
        return None if route is None else self._engines[route.replica]

    def _end(self, request_id: str) -> None:
        self._router.end(self._routes.pop(request_id))

    def step(self) -> StepOutputs:
        """Steps every replica; while one is waited for, the others compute."""
        steps = [engine.step() for engine in self._engines]
        outputs = StepOutputs(
            keys=list(chain.from_iterable(step.keys for step in steps)),
            token_ids=list(chain.from_iterable(step.token_ids for step in steps)),
            others=list(chain.from_iterable(step.others for step in steps)),
        )
        for output in outputs.others:
            owner = self._owner(output.request_id)
            if owner is not None and not owner.is_open(output.request_id):
                self._end(output.request_id)
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

    def reset_prefix_cache(self) -> bool:
        """Forgets cached prefixes of all replicas."""
        self._router.forget()
        results = [engine.reset_prefix_cache() for engine in self._engines]
        return all(results)

    def close(self) -> None:
        """Closes every replica."""
        for engine in self._engines:
            engine.close()
