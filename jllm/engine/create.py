"""Puts an engine together: files, mesh, model, weights, programs, pool."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jllm.config import EngineConfig, SchedulerConfig
from jllm.engine.admission import Limits
from jllm.engine.engine import Engine, EngineParts, ModelInfo
from jllm.engine.memory import MemoryBudget, default_utilization, device_capacity
from jllm.engine.programs import (
    ProgramBuilder,
    ProgramOptions,
    Programs,
    ProgramSizes,
    choose_sizes,
)
from jllm.engine.replicas import Replicas
from jllm.errors import ConfigError
from jllm.layers.kernels import Target
from jllm.models.base import Model, ModelOptions, Weights
from jllm.models.hf_config import longest_context, read_integer
from jllm.models.registry import build_model
from jllm.sampling.rules import RuleLayout
from jllm.scheduler.scheduler import Scheduler
from jllm.weights.hub import CheckpointFiles, resolve_model
from jllm.weights.loader import load_weights
from jllm.weights.random import random_weights
from shardings.mesh import make_mesh, replica_meshes
from shardings.place import tree_shardings

logger = logging.getLogger("jllm")

DEFAULT_MODEL = Path(__file__).parents[1] / "default_model"
"""The embedded model, used when none is named."""

MIN_POOL_TOKENS = 65536
"""A pool is not made smaller than this only because few rows could use it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Resolved:
    """The options with everything decided that "auto" left open.

    Attributes:
        dtype: Type of weights and activations.
        kv_dtype: Type of the pool.
        max_model_len: Longest context wanted.
        max_num_seqs: Rows of the table.
        token_budget: Most tokens of a step.
        block_size: Places per block.
        utilization: Share of the device's memory.
        max_logprobs: Most log-probabilities per token.
        sizes: The buckets.
    """

    dtype: str
    kv_dtype: str
    max_model_len: int
    max_num_seqs: int
    token_budget: int
    block_size: int
    utilization: float
    max_logprobs: int
    sizes: ProgramSizes


def create_engine(config: EngineConfig) -> Engine | Replicas:
    """Loads a model and makes it ready: one engine, or one per replica.

    Raises:
        ConfigError: An option does not fit the model or the machine.
        ModelNotFoundError, UnsupportedModelError, CheckpointError: See `jllm.errors`.
    """
    use_compilation_cache(config.compilation_cache_dir)
    files = resolve_model(
        config.model or str(DEFAULT_MODEL),
        revision=config.revision,
        with_weights=config.load_format != "random",
    )
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


def use_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs on disk, unless the process has chosen a folder."""
    if folder is None:
        chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        if chosen is not None:
            return
        folder = str(Path.home() / ".cache" / "jllm" / "programs")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def resolve_options(
    config: EngineConfig,
    model_config: Mapping[str, Any],
    platform: str,
    vocab_size: int,
) -> Resolved:
    """Decides what the options leave open, from the model and the device.

    Raises:
        ConfigError: `max_model_len` is longer than the model's context, or the kernels
            asked for are for other devices.
    """
    is_cpu = platform == "cpu"
    wanted = config.attention.partition("_")[0]
    if wanted in ("gpu", "tpu") and wanted != platform:
        raise ConfigError(
            f"attention={config.attention!r} needs a {wanted.upper()}; the model runs "
            f"on a {platform.upper()}"
        )
    longest = longest_context(model_config)
    max_model_len = config.max_model_len or longest
    if max_model_len > longest:
        raise ConfigError(
            f"max_model_len={max_model_len} exceeds the {longest} tokens that the "
            "model's position embeddings reach"
        )
    max_num_seqs = config.max_num_seqs or (32 if is_cpu else 256)
    # Every running row must find room for its token in a step.
    default_budget = max(max_num_seqs, 512 if is_cpu else 4096)
    token_budget = config.max_num_batched_tokens or default_budget
    if token_budget < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens={token_budget} must be at least "
            f"max_num_seqs={max_num_seqs}"
        )
    utilization = config.memory_utilization
    max_logprobs = vocab_size if config.max_logprobs == -1 else config.max_logprobs
    dtype = config.dtype if config.dtype != "auto" else saved_dtype(model_config)
    return Resolved(
        dtype=dtype,
        kv_dtype="uint16" if is_cpu and jnp.dtype(dtype).itemsize == 2 else dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        token_budget=token_budget,
        block_size=config.block_size or (128 if platform == "tpu" else 16),
        utilization=(
            default_utilization(platform) if utilization is None else utilization
        ),
        max_logprobs=min(max_logprobs, vocab_size),
        sizes=choose_sizes(platform, max_num_seqs, token_budget),
    )


def saved_dtype(model_config: Mapping[str, Any]) -> str:
    """The type that the checkpoint was saved in, float32 when it does not say."""
    name = model_config.get("dtype") or model_config.get("torch_dtype") or "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"config.json: dtype={name!r} is not supported; set dtype")
    return str(name)


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
        ),
    )
    weights = _make_weights(config, files, model, mesh, resolved.dtype)
    return _assemble(config, files, resolved, model, weights, mesh, capacity)


def _make_weights(
    config: EngineConfig,
    files: CheckpointFiles,
    model: Model,
    mesh: jax.sharding.Mesh,
    dtype: str,
) -> Weights:
    specs = model.specs()
    places = tree_shardings(specs, mesh)
    if config.load_format == "random":
        return random_weights(specs, places, dtype, config.seed)
    tied = "head" not in specs
    ignore = ("lm_head.weight",) if tied else ()
    return load_weights(files, specs, places, dtype, ignore=ignore)


def _assemble(
    config: EngineConfig,
    files: CheckpointFiles,
    resolved: Resolved,
    model: Model,
    weights: Weights,
    mesh: jax.sharding.Mesh,
    capacity: int,
) -> Engine:
    """Compiles, sizes the pool, and puts the parts together."""
    place = NamedSharding(mesh, PartitionSpec())
    try:
        options, programs = _programs_that_fit(
            config, resolved, model, weights, place, capacity
        )
    except NotImplementedError as error:  # "auto" would have gone on to another kernel
        raise ConfigError(
            f"attention={config.attention!r} cannot run this model: {error}"
        ) from error
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
        )
    )
    limits = Limits(
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        max_logprobs=resolved.max_logprobs,
        eos_token_ids=eos_token_ids(files),
    )
    return Engine(
        EngineParts(
            model=model,
            weights=weights,
            scheduler=scheduler,
            programs=programs,
            options=options,
            limits=limits,
            info=ModelInfo(files.path, default_sampling(config, files)),
            place=place,
            overlap=config.overlap,
            seed=config.seed,
        )
    )


def _programs_that_fit(
    config: EngineConfig,
    resolved: Resolved,
    model: Model,
    weights: Weights,
    place: NamedSharding,
    capacity: int,
) -> tuple[ProgramOptions, Programs]:
    """Compiles for the largest useful pool, and again if that does not fit.

    What a program needs beside the pool does not depend on the pool's size, so that
    the first compilation tells it.
    """
    blocks_per_row = -(-resolved.max_model_len // resolved.block_size)
    useful = max(
        2 * resolved.max_num_seqs * blocks_per_row,
        MIN_POOL_TOKENS // resolved.block_size,
    )
    options = _program_options(resolved, model, config.num_blocks or useful)
    programs = _compile(options, model, weights, place)
    budget = MemoryBudget(
        capacity=capacity,
        utilization=resolved.utilization,
        weights=_bytes_per_device(weights),
        temporaries=programs.temporary_bytes(),
        block=_block_bytes(model, resolved.block_size),
        most_useful_blocks=options.num_blocks,
    )
    num_blocks = config.num_blocks or budget.require(1)
    if num_blocks != options.num_blocks:
        programs.close()
        options = _program_options(resolved, model, num_blocks)
        programs = _compile(options, model, weights, place)
    logger.info(
        "KV pool: %.2f GiB, %d blocks of %d tokens, %d tokens in all; "
        "weights %.2f GiB, temporaries %.2f GiB per device",
        num_blocks * budget.block / 2**30,
        num_blocks,
        resolved.block_size,
        num_blocks * resolved.block_size,
        budget.weights / 2**30,
        budget.temporaries / 2**30,
    )
    if config.compile_ahead:
        programs.compile_rest()
    return options, programs


def _compile(
    options: ProgramOptions, model: Model, weights: Weights, place: NamedSharding
) -> Programs:
    programs = Programs(ProgramBuilder(model, options, weights, place), options)
    programs.compile_first()
    return programs


def _program_options(
    resolved: Resolved, model: Model, num_blocks: int
) -> ProgramOptions:
    block_size = resolved.block_size
    max_len = min(resolved.max_model_len, num_blocks * block_size)
    max_blocks = -(-max_len // block_size)
    new_blocks = -(-resolved.token_budget // block_size)
    rule_layout = RuleLayout(model.padded_vocab_size)
    platform = jax.default_backend()
    return ProgramOptions(
        sizes=resolved.sizes,
        num_blocks=num_blocks,
        block_size=block_size,
        max_blocks=max_blocks,
        # Room for one row's whole table, beside what the other rows' tokens need.
        max_appends=max_blocks + new_blocks + resolved.max_num_seqs,
        max_copies=min(8, resolved.max_num_seqs),
        num_logprobs=resolved.max_logprobs,
        rule_size=rule_layout.size,
        draw_method="inverse_cdf" if platform == "cpu" else "gumbel",
    )


def _bytes_per_device(tree: object) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def _block_bytes(model: Model, block_size: int) -> int:
    """One block of all layers on one device, and its place in the token history."""
    elements = math.prod(model.kv_shape(1, block_size)) * model.num_layers
    pools = elements * jnp.dtype(model.kv_dtype).itemsize
    return pools // model.options.tensor_size + 4 * block_size


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
