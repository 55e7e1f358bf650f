"""A host that schedules nothing: it runs the programs that the first one tells it."""

import signal
import threading

from jllm.config import EngineConfig
from jllm.distributed.facts import make_facts
from jllm.distributed.follower import Follower
from jllm.distributed.join import follow as join
from jllm.engine.create import (
    make_executor,
    make_meshes,
    plan_replica,
    plan_weights,
    resolve_files,
    use_compilation_cache,
)
from jllm.engine.executor import Executor
from jllm.engine.startup import Compiling, StartPlan
from jllm.errors import ConfigError
from jllm.models.base import Weights
from jllm.weights.digest import checkpoint_digests


def follow(config: EngineConfig) -> None:
    """Does what the host with `host_id=0` says, until its engine is closed.

    If that host, another one or this one fails, the process ends with exit code 70.

    Args:
        config: The same options as there, but for paths and for `host_id`.

    Raises:
        ConfigError: The hosts do not come together, or differ.
    """
    hosts = config.hosts
    if hosts is None or hosts.host_id == 0:
        raise ConfigError("only a host with host_id of at least 1 follows another")
    use_compilation_cache(config.compilation_cache_dir, fills=True)
    files = resolve_files(config)
    leader = join(hosts, make_facts(config, checkpoint_digests(files)))
    if threading.current_thread() is threading.main_thread():
        # A terminal sends Ctrl-C to all hosts; the first one decides when all end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        (mesh,) = make_meshes(config)
        plan = plan_replica(config, files, mesh)
        leader.report_capacity(plan.capacity)
        _obey(plan, leader)
    # Whatever it is, the others wait for this host.
    except BaseException as error:
        leader.fail(error)
        raise


def _obey(plan: StartPlan, leader: Follower) -> None:
    weights: Weights | None = None
    compiling: Compiling | None = None
    executor: Executor | None = None
    for name, *values in leader.orders():
        if name == "run":
            assert executor is not None
            leader.note_launched(executor.execute(*values))
        elif name == "pool":
            if compiling is not None:
                compiling.programs.close()
            compiling = plan.compile(*values, readiness=leader)
            weights = plan_weights(plan) if weights is None else weights
        else:
            assert name == "serve"
            assert compiling is not None
            assert weights is not None
            executor = _serve(plan, compiling, weights, leader)
    if executor is not None:
        executor.close()


def _serve(
    plan: StartPlan, compiling: Compiling, weights: Weights, leader: Follower
) -> Executor:
    """Waits for the programs that serve anything, and says so."""
    programs = compiling.programs
    programs.compile_first()
    executor = make_executor(plan, programs, weights)
    leader.watch_compiling(lambda: programs.is_awaited)
    leader.report_serving()
    if plan.config.compile_ahead:
        programs.compile_rest()
    return executor
