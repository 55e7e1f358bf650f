"""A model and its weights without an engine, for those who study them."""

from typing import Literal

import jax
from jax.sharding import Mesh

from jllm.config import Dtype, EngineConfig
from jllm.engine.create import make_weights, resolve_files
from jllm.engine.options import resolve_options
from jllm.layers.kernels import Implementation, Target
from jllm.models.base import Model, ModelOptions, Weights
from jllm.models.hf_config import read_integer
from jllm.models.registry import build_model
from shardings.mesh import make_mesh


def load(
    path: str | None = None,
    mesh: Mesh | None = None,
    *,
    dtype: Dtype = "auto",
    attention: Implementation = "reference",
    max_model_len: int | None = None,
    load_format: Literal["auto", "random"] = "auto",
) -> tuple[Model, Weights]:
    """The functions of a model, and the arrays that they take.

    Args:
        path: Folder or Hub id of a checkpoint; None for the embedded model.
        mesh: Devices that share it, as `shardings.mesh.make_mesh` arranges them; None
            for the first device alone.
        dtype: Type of weights and activations; "auto" for that of the checkpoint.
        attention: "reference" can be differentiated any number of times; "auto" is
            what the engine takes.
        max_model_len: Longest context; some kinds of RoPE depend on it.
        load_format: "random" needs a config.json only.

    Raises:
        ConfigError: An option does not fit the model or the machine.
        ModelNotFoundError, UnsupportedModelError, CheckpointError: See `jllm.errors`.
    """
    config = EngineConfig(
        model=path,
        dtype=dtype,
        attention=attention,
        max_model_len=max_model_len,
        load_format=load_format,
    )
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    device = mesh.devices.flat[0]
    files = resolve_files(config)
    vocab_size = read_integer(files.config, "vocab_size")
    resolved = resolve_options(config, files.config, device.platform, vocab_size)
    model = build_model(
        files.config,
        ModelOptions(
            dtype=resolved.dtype,
            max_model_len=resolved.max_model_len,
            attention=attention,
            target=Target.of(device),
            mesh=mesh if mesh.size > 1 else None,
        ),
    )
    return model, make_weights(config, files, model, mesh, resolved.dtype)
