"""Puts an engine together: files, mesh, model, weights, programs, pool."""

import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from jllm.config import EngineConfig, SchedulerConfig
from jllm.distributed.facts import make_facts
from jllm.distributed.join import lead
from jllm.distributed.leader import Leader
from jllm.engine.admission import Limits
from jllm.engine.engine import Engine, EngineParts, ModelInfo
from jllm.engine.executor import Executor
from jllm.engine.memory import device_capacity
from jllm.engine.options import resolve_options
from jllm.engine.programs import Programs
from jllm.engine.replicas import Replicas
from jllm.engine.startup import (
    Compiling,
    StartPlan,
    compilation_cache,
    programs_that_fit,
)
from jllm.errors import ConfigError
from jllm.layers.kernels import Target
from jllm.models.base import Model, ModelOptions, Weights
from jllm.models.hf_config import read_integer
from jllm.models.pipeline import pipelined
from jllm.models.registry import build_model
from jllm.processors import argument_defaults
from jllm.sampling.processors import check_processors
from jllm.sampling.rules import RuleLayout
from jllm.scheduler.scheduler import Scheduler
from jllm.weights.digest import checkpoint_digests
from jllm.weights.hub import CheckpointFiles, resolve_model
from jllm.weights.loader import load_weights
from jllm.weights.random import random_weights
from shardings.mesh import make_mesh, replica_meshes
from shardings.place import tree_shardings

DEFAULT_MODEL = Path(__file__).parents[1] / "default_model"
"""The embedded model, used when none is named."""


def create_engine(config: EngineConfig) -> Engine | Replicas:
    """Loads a model and makes it ready: one engine, or one per replica.

    Raises:
        ConfigError: An option does not fit the model or the machine.
        ModelNotFoundError, UnsupportedModelError, CheckpointError: See `jllm.errors`.
    """
    if config.is_follower:
        raise ConfigError(
            "only the host with host_id=0 has an engine; call jllm.follow"
        )
    use_compilation_cache(
        config.compilation_cache_dir, fills=config.executables in (None, "auto")
    )
    files = resolve_files(config)
    leader = None
    if config.hosts is not None and config.hosts.num_hosts > 1:
        leader = lead(config.hosts, make_facts(config, checkpoint_digests(files)))
    try:
        return _create(config, files, leader)
    except BaseException as error:
        if leader is not None:
            leader.give_up(f"host 0 failed: {error}")
        raise


def _create(
    config: EngineConfig, files: CheckpointFiles, leader: Leader | None
) -> Engine | Replicas:
    engines = [
        _create_replica(config, files, mesh, leader) for mesh in make_meshes(config)
    ]
    return engines[0] if len(engines) == 1 else Replicas(engines)


def make_meshes(config: EngineConfig) -> tuple[Mesh, ...]:
    """Divides the devices of all hosts among the replicas.

    Raises:
        ConfigError: They are too few, or a host has none in use.
    """
    mesh = device_mesh(config)
    used = {device.process_index for device in mesh.devices.flat}
    devices = jax.devices()
    idle = sorted({device.process_index for device in devices} - used)
    if idle:
        raise ConfigError(
            f"{mesh.size} devices leave the {len(devices)} of all hosts partly idle: "
            f"host {', '.join(map(str, idle))} has nothing to do"
        )
    return replica_meshes(mesh)


def device_mesh(config: EngineConfig) -> Mesh:
    """The first devices, as many as all axes together need.

    Raises:
        ConfigError: There are fewer.
    """
    sizes = {
        name: getattr(config, name)
        for name in (
            "pipeline_parallel_size",
            "tensor_parallel_size",
            "data_parallel_size",
        )
    }
    pipe, tensor, data = sizes.values()
    devices, needed = jax.devices(), math.prod(sizes.values())
    if needed > len(devices):
        product = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ConfigError(
            f"{product} needs {needed} devices, but there are {len(devices)}"
        )
    return make_mesh(tensor=tensor, data=data, pipe=pipe, devices=devices[:needed])


def use_compilation_cache(folder: str | None, *, fills: bool) -> None:
    """Keeps compiled programs on disk, unless the process has chosen a folder.

    Args:
        folder: Where; none is the user's cache folder.
        fills: Whether new ones are kept; exported executables would be there twice.
    """
    if folder is None:
        if compilation_cache() is not None:
            return
        folder = str(Path.home() / ".cache" / "jllm" / "programs")
    jax.config.update("jax_compilation_cache_dir", folder)
    least = 0.5 if fills else math.inf
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def eos_token_ids(files: CheckpointFiles) -> tuple[int, ...]:
    """Tokens that end an output, from generation_config.json, else config.json."""
    for source in (files.generation_config, files.config):
        value = source.get("eos_token_id")
        if value is not None:
            return (value,) if isinstance(value, int) else tuple(value)
    return ()


def plan_replica(
    config: EngineConfig,
    files: CheckpointFiles,
    mesh: Mesh,
    leader: Leader | None = None,
) -> StartPlan:
    """Decides about a replica on devices that are there.

    Args:
        config: The options.
        files: The checkpoint's settings.
        mesh: Devices of the replica.
        leader: The other hosts, on the first of several.
    """
    capacity = device_capacity(mesh)
    if leader is not None:
        capacity = leader.least_capacity(capacity)
    target = Target.of(mesh.local_devices[0])
    return plan_start(config, files, mesh, target, capacity, leader)


def plan_start(
    config: EngineConfig,
    files: CheckpointFiles,
    mesh: Mesh | AbstractMesh,
    target: Target,
    capacity: int,
    leader: Leader | None = None,
) -> StartPlan:
    """Decides everything about a replica that needs neither weights nor devices.

    Args:
        config: The options.
        files: The checkpoint's settings.
        mesh: Devices of the replica.
        target: What they are.
        capacity: Bytes that each of them can give.
        leader: The other hosts, on the first of several.

    Raises:
        ConfigError, UnsupportedModelError: An option, or a value of config.json, does
            not fit.
    """
    vocab_size = read_integer(files.config, "vocab_size")
    resolved = resolve_options(config, files.config, target.platform, vocab_size)
    check_processors(resolved.processors, vocab_size)
    model = build_model(
        files.config,
        ModelOptions(
            dtype=resolved.dtype,
            kv_dtype=resolved.kv_dtype,
            kv_width_multiple=128 if target.platform == "tpu" else 1,
            max_model_len=resolved.max_model_len,
            attention=config.attention,
            target=target,
            mesh=mesh if mesh.size > 1 else None,
        ),
    )
    if config.pipeline_parallel_size > 1:
        model = pipelined(model)
    return StartPlan(config, files, resolved, model, mesh, capacity, leader)


def _create_replica(
    config: EngineConfig, files: CheckpointFiles, mesh: Mesh, leader: Leader | None
) -> Engine:
    plan = plan_replica(config, files, mesh, leader)
    # Compiled from shapes, while the weights are read.
    compiling = plan.start()
    try:
        weights = plan_weights(plan)
        # Closes what it replaces, so that only the newest is left to close.
        compiling = fitting_programs(plan, compiling)
        engine = _assemble(plan, compiling, weights)
    except BaseException:
        compiling.programs.close()
        raise
    if leader is not None:
        leader.watch_compiling(lambda: engine.programs.is_awaited)
        leader.start_serving()
    return engine


def plan_weights(plan: StartPlan) -> Weights:
    """The weights of a replica."""
    dtype = plan.resolved.dtype
    return make_weights(plan.config, plan.files, plan.model, plan.mesh, dtype)


def resolve_files(config: EngineConfig) -> CheckpointFiles:
    """Finds the checkpoint, or the config.json alone where weights are random."""
    return resolve_model(
        config.model or str(DEFAULT_MODEL),
        revision=config.revision,
        with_weights=config.load_format != "random",
    )


def make_weights(
    config: EngineConfig,
    files: CheckpointFiles,
    model: Model,
    mesh: Mesh | AbstractMesh,
    dtype: str,
) -> Weights:
    """Loads the weights onto their devices, or draws them."""
    specs = model.specs()
    places = tree_shardings(specs, mesh)
    if config.load_format == "random":
        return random_weights(specs, places, dtype, config.seed)
    tied = "head" not in specs
    ignore = ("lm_head.weight",) if tied else ()
    return load_weights(files, specs, places, dtype, ignore=ignore)


def fitting_programs(plan: StartPlan, compiling: Compiling) -> Compiling:
    """Waits for the programs to be able to serve; see `programs_that_fit`.

    Raises:
        ConfigError: The kernels asked for cannot run the model.
    """
    try:
        return programs_that_fit(plan, compiling)
    except NotImplementedError as error:  # "auto" would have gone on to another kernel
        raise ConfigError(
            f"attention={plan.config.attention!r} cannot run this model: {error}"
        ) from error


def _assemble(plan: StartPlan, compiling: Compiling, weights: Weights) -> Engine:
    """Puts the parts together, once the first programs are there."""
    config, resolved, model = plan.config, plan.resolved, plan.model
    options, programs = compiling.options, compiling.programs
    pool_tokens = options.num_blocks * resolved.block_size
    max_model_len = min(resolved.max_model_len, pool_tokens)
    if config.max_model_len is not None and max_model_len < config.max_model_len:
        raise ConfigError(
            f"max_model_len={config.max_model_len} does not fit the KV pool of "
            f"{pool_tokens} tokens; lower it, or raise memory_utilization or num_blocks"
        )
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=resolved.max_num_seqs,
            token_budget=resolved.token_budget,
            block_size=resolved.block_size,
            num_blocks=options.num_blocks,
            max_model_len=max_model_len,
            max_block_appends=options.max_appends,
            max_block_copies=options.max_copies,
            enable_prefix_caching=config.enable_prefix_caching,
            window_pools=options.window_pools,
            num_stages=config.pipeline_parallel_size,
        )
    )
    limits = Limits(
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        max_logprobs=resolved.max_logprobs,
        eos_token_ids=eos_token_ids(plan.files),
        width=model.width,
        activations=_activations(plan),
        extra_args=argument_defaults(resolved.processors),
        has_processors=bool(resolved.processors),
    )
    return Engine(
        EngineParts(
            model=model,
            executor=make_executor(plan, programs, weights),
            scheduler=scheduler,
            options=options,
            limits=limits,
            info=ModelInfo(plan.files.path, default_sampling(config, plan.files)),
            overlap=config.overlap,
            seed=config.seed,
        )
    )


def make_executor(plan: StartPlan, programs: Programs, weights: Weights) -> Executor:
    """Puts together what runs the programs; makes the device state."""
    words = RuleLayout(plan.model.padded_vocab_size).sizes["allowed"]
    return Executor(weights, programs, plan.place, words, plan.leader)


def _activations(plan: StartPlan) -> tuple[str, ...]:
    """What can be captured and edited while serving: in one program of one host."""
    several = plan.leader is not None or plan.config.pipeline_parallel_size > 1
    return () if several else plan.model.activations


def default_sampling(config: EngineConfig, files: CheckpointFiles) -> dict[str, Any]:
    """Sampling parameters that the model's generation_config.json recommends."""
    if config.generation_config == "vllm":
        return {}
    known = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = files.generation_config
    sampling = {name: given[name] for name in known if given.get(name) is not None}
    if given.get("do_sample") is False:
        sampling["temperature"] = 0.0
    return sampling
