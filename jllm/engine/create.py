"""Puts an engine together: files, mesh, model, weights, programs, pool."""

import math
from pathlib import Path
from typing import Any

import jax

from jllm.config import EngineConfig, SchedulerConfig
from jllm.engine.admission import Limits
from jllm.engine.engine import Engine, EngineParts, ModelInfo
from jllm.engine.memory import device_capacity
from jllm.engine.options import resolve_options
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
from jllm.models.registry import build_model
from jllm.scheduler.scheduler import Scheduler
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
    use_compilation_cache(
        config.compilation_cache_dir, fills=config.executables is None
    )
    files = resolve_files(config)
    size, replicas = config.tensor_parallel_size, config.data_parallel_size
    devices = jax.devices()
    if size * replicas > len(devices):
        raise ConfigError(
            f"tensor_parallel_size={size} x data_parallel_size={replicas} needs "
            f"{size * replicas} devices, but there are {len(devices)}"
        )
    mesh = make_mesh(tensor=size, data=replicas, devices=devices[: size * replicas])
    engines = [
        _create_replica(config, files, sub_mesh) for sub_mesh in replica_meshes(mesh)
    ]
    return engines[0] if replicas == 1 else Replicas(engines)


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


def _create_replica(
    config: EngineConfig, files: CheckpointFiles, mesh: jax.sharding.Mesh
) -> Engine:
    device = mesh.devices.flat[0]
    vocab_size = read_integer(files.config, "vocab_size")
    resolved = resolve_options(config, files.config, device.platform, vocab_size)
    capacity = device_capacity(mesh)
    model = build_model(
        files.config,
        ModelOptions(
            dtype=resolved.dtype,
            kv_dtype=resolved.kv_dtype,
            kv_width_multiple=128 if device.platform == "tpu" else 1,
            max_model_len=resolved.max_model_len,
            attention=config.attention,
            target=Target.of(device),
            mesh=mesh if mesh.size > 1 else None,
            row_tiles=resolved.row_tiles,
        ),
    )
    plan = StartPlan(config, files, resolved, model, mesh, capacity)
    # Compiled from shapes, while the weights are read.
    compiling = plan.start()
    try:
        weights = make_weights(config, files, model, mesh, resolved.dtype)
        # Closes what it replaces, so that only the newest is left to close.
        compiling = _fitting_programs(plan, compiling)
        return _assemble(plan, compiling, weights)
    except BaseException:
        compiling.programs.close()
        raise


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
    mesh: jax.sharding.Mesh,
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


def _fitting_programs(plan: StartPlan, compiling: Compiling) -> Compiling:
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
        )
    )
    limits = Limits(
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        max_logprobs=resolved.max_logprobs,
        eos_token_ids=eos_token_ids(plan.files),
        width=model.width,
    )
    return Engine(
        EngineParts(
            model=model,
            weights=weights,
            scheduler=scheduler,
            programs=programs,
            options=options,
            limits=limits,
            info=ModelInfo(plan.files.path, default_sampling(config, plan.files)),
            place=plan.place,
            overlap=config.overlap,
            seed=config.seed,
        )
    )


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
