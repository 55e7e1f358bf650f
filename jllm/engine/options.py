"""Decides what the engine's options leave open, from the model and the device."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jllm.config import EngineConfig
from jllm.engine.memory import default_utilization
from jllm.engine.programs import ProgramSizes, choose_sizes
from jllm.errors import ConfigError
from jllm.models.hf_config import longest_context
from jllm.processors import LogitsProcessor


@dataclasses.dataclass(frozen=True, slots=True)
class Resolved:
    """The options with everything decided that "auto" left open.

    Attributes:
        platform: Kind of device, which need not be there.
        dtype: Type of weights and activations.
        kv_dtype: Type of the pool.
        max_model_len: Longest context wanted.
        max_num_seqs: Rows of the table.
        token_budget: Most tokens of a step.
        block_size: Places per block.
        utilization: Share of the device's memory.
        max_logprobs: Most log-probabilities per token.
        sizes: The buckets.
        processors: Functions of the user over the scores.
    """

    platform: str
    dtype: str
    kv_dtype: str
    max_model_len: int
    max_num_seqs: int
    token_budget: int
    block_size: int
    utilization: float
    max_logprobs: int
    sizes: ProgramSizes
    processors: tuple[LogitsProcessor, ...] = ()


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
        platform=platform,
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
        processors=tuple(config.logits_processors),
    )


def saved_dtype(model_config: Mapping[str, Any]) -> str:
    """The type that the checkpoint was saved in, float32 when it does not say."""
    name = model_config.get("dtype") or model_config.get("torch_dtype") or "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"config.json: dtype={name!r} is not supported; set dtype")
    return str(name)
