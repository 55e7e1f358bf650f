"""`jllm batch --ray`: one worker per replica, placed and restarted by Ray.

The workers share the job as any others do, by claims in its folder; Ray gives them
machines and tells when one is dead. Its lines then go to others at once, and a new
worker is started in its place.
"""

import contextlib
import dataclasses
import importlib
import logging
from collections.abc import Callable
from typing import Any

from jllm import ConfigError, EngineConfig
from jllm.batch import Store, declare_dead, open_job, summary
from server.batch.options import BatchOptions
from server.batch.process import early_signals, run_batch

logger = logging.getLogger("jllm")

ENGINE_FAILED = 1
MAX_DEATHS = 100
PLACEMENT_SECONDS = 600.0

RunWorker = Callable[[EngineConfig, BatchOptions], int]


def run_replicas(
    engine: EngineConfig, options: BatchOptions, run_worker: RunWorker | None = None
) -> int:
    """Runs a job on `num_replicas` workers in a Ray cluster until it is done.

    Args:
        engine: Options of every replica's engine.
        options: Options of the job; its folder must be one that all machines see.
        run_worker: What every worker does; `run_batch` where none is given.

    Returns:
        The exit code: 0, or the first of a worker that could not go on.

    Raises:
        JllmError: An option or an input is wrong, Ray is missing, or the replicas
            cannot be placed.
    """
    ray = _import_ray()
    assert options.output is not None
    store = Store(options.output)
    # Before anything is placed, so that what is wrong is said here.
    open_job(store, options.inputs, options.settings(engine), options.range_lines)
    if summary(store) is not None:
        return 0
    was_running = ray.is_initialized()
    if not was_running:
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
    try:
        with early_signals():
            replicas = _Replicas(ray, engine, options, run_worker or _run_worker)
            with contextlib.closing(replicas):
                return replicas.run(store)
    finally:
        if not was_running:
            ray.shutdown()


def _import_ray() -> Any:
    """Ray, which need not be installed."""
    try:
        importlib.import_module("ray.util.scheduling_strategies")
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("ray=True needs Ray: pip install 'jllm[ray]'") from error


def _run_worker(engine: EngineConfig, options: BatchOptions) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_batch(engine, options, has_signals=False)


class _Actor:
    """One worker, in a process of Ray's."""

    def work(
        self, engine: EngineConfig, options: BatchOptions, run_worker: RunWorker
    ) -> tuple[int, str]:
        """Works until the job is done; returns the exit code and what was wrong."""
        try:
            return run_worker(engine, options), ""
        # Whatever it is must not end the other replicas.
        except Exception as error:  # noqa: BLE001
            return ENGINE_FAILED, f"{type(error).__name__}: {error}"


@dataclasses.dataclass(frozen=True, slots=True)
class _Replica:
    """A worker that runs.

    Attributes:
        place: Its bundle of the placement group.
        name: Its name in the job's folder; a worker in its place has another.
        actor: Its actor, which ends when nothing refers to it.
    """

    place: int
    name: str
    actor: Any


class _Replicas:
    """The workers and their places."""

    def __init__(
        self,
        ray: Any,
        engine: EngineConfig,
        options: BatchOptions,
        run_worker: RunWorker,
    ) -> None:
        """Waits for the places.

        Raises:
            ConfigError: The cluster has no room.
        """
        self._ray = ray
        self._engine = engine
        self._options = options
        self._run_worker = run_worker
        self._resources: dict[str, Any] = dict(options.ray_resources or {"CPU": 1})
        self._num_started = 0
        self._running: dict[Any, _Replica] = {}
        self._group: Any = ray.util.placement_group(
            [self._resources] * options.num_replicas, strategy="SPREAD"
        )
        if not self._group.wait(PLACEMENT_SECONDS):
            self.close()
            raise ConfigError(
                f"num_replicas={options.num_replicas} with {self._resources} each find "
                f"no room in the cluster, which has {ray.cluster_resources()}"
            )

    def run(self, store: Store) -> int:
        """Runs workers until all have ended; dead ones are replaced."""
        for place in range(self._options.num_replicas):
            self._start(place)
        num_deaths, codes = 0, list[int]()
        while self._running:
            (task,), _ = self._ray.wait(list(self._running), num_returns=1)
            replica = self._running.pop(task)
            try:
                code, problem = self._ray.get(task)
            except self._ray.exceptions.RayError:
                num_deaths += 1
                logger.warning("replica %s has died", replica.name)
                declare_dead(store, replica.name)
                if num_deaths <= MAX_DEATHS:
                    self._start(replica.place)
                    continue
                code, problem = ENGINE_FAILED, f"replicas died {num_deaths} times"
            codes.append(code)
            if problem:
                logger.error("replica %s: %s", replica.name, problem)
        # The job is done if anyone says so: all lines have been answered then.
        return 0 if 0 in codes else codes[0]

    def close(self) -> None:
        """Ends what still runs and gives the places back."""
        for replica in self._running.values():
            self._ray.kill(replica.actor)
        self._running.clear()
        self._ray.util.remove_placement_group(self._group)

    def _start(self, place: int) -> None:
        name = f"ray_{place}_{self._num_started}"
        self._num_started += 1
        strategies = self._ray.util.scheduling_strategies
        needs = dict(self._resources)
        actor_class = self._ray.remote(_Actor).options(
            num_cpus=needs.pop("CPU", 0),
            num_gpus=needs.pop("GPU", 0),
            resources=needs,
            scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=place
            ),
        )
        options = dataclasses.replace(
            self._options,
            worker_id=name,
            shared=True,
            ray=False,
            num_replicas=1,
            ray_resources=None,
        )
        actor = actor_class.remote()
        task = actor.work.remote(self._engine, options, self._run_worker)
        self._running[task] = _Replica(place, name, actor)
