"""What the families' config.json files have in common."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jllm.layers.norm import NormKind
from jllm.layers.rope import RopeConfig
from jllm.models.decoder_config import (
    DecoderConfig,
    EmbeddingConfig,
    LayerConfig,
    MlpConfig,
)
from jllm.models.hf_config import (
    FULL,
    SLIDING,
    read_activation,
    read_flag,
    read_heads,
    read_integer,
    read_layer_types,
    read_number,
)


def read_decoder(
    config: Mapping[str, Any], *, activation: str = "hidden_act"
) -> DecoderConfig:
    """A plain decoder: root-mean-square norms before each half, a gated MLP, no biases.

    Families replace what is theirs.

    Args:
        config: Content of config.json.
        activation: Key of the activation function.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
    """
    num_heads, num_kv_heads, head_dim = read_heads(config)
    num_layers = read_integer(config, "num_hidden_layers", high=1024)
    return DecoderConfig(
        vocab_size=read_integer(config, "vocab_size"),
        width=read_integer(config, "hidden_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layers=(LayerConfig(RopeConfig.from_hf(config)),) * num_layers,
        norm=NormKind(read_number(config, "rms_norm_eps", 1e-6)),
        mlp=MlpConfig(
            width=read_integer(config, "intermediate_size"),
            activation=read_activation(config, activation, "silu"),
        ),
        embedding=EmbeddingConfig(tied=read_flag(config, "tie_word_embeddings", False)),
    )


def with_windows(
    shape: DecoderConfig, window: int | None, types: Sequence[str] | None = None
) -> DecoderConfig:
    """The same decoder with a window in its sliding layers.

    Args:
        shape: A decoder.
        window: Newest positions that a query sees; None for all.
        types: Attention of each layer, `FULL` or `SLIDING`; None slides everywhere.
    """
    layers = tuple(
        dataclasses.replace(layer, window=window if kind == SLIDING else None)
        for layer, kind in zip(
            shape.layers, types or [SLIDING] * shape.num_layers, strict=True
        )
    )
    return dataclasses.replace(shape, layers=layers)


def with_upper_windows(
    shape: DecoderConfig, config: Mapping[str, Any]
) -> DecoderConfig:
    """The same decoder with a window in the layers above the first few.

    Raises:
        UnsupportedModelError: A value is of another type or out of range.
    """
    if not read_flag(config, "use_sliding_window", False):
        return shape
    first = 0
    if config.get("max_window_layers", 28) != 0:
        first = read_integer(config, "max_window_layers", 28)
    default = [SLIDING if i >= first else FULL for i in range(shape.num_layers)]
    types = read_layer_types(config, default)
    return with_windows(shape, read_window(config, 4096), types)


def read_window(config: Mapping[str, Any], default: int | None = None) -> int | None:
    """The config's sliding window; None where it is missing or null.

    Raises:
        UnsupportedModelError: Not a positive integer.
    """
    if config.get("sliding_window", default) is None:
        return None
    return read_integer(config, "sliding_window", default)


def read_ropes(
    config: Mapping[str, Any], thetas: Mapping[str, float]
) -> dict[str, RopeConfig]:
    """Rotary embeddings of full and of sliding layers, which differ.

    In the old format only the full layers' are stretched.

    Args:
        config: Content of config.json.
        thetas: Base of each where the config does not say.

    Raises:
        UnsupportedModelError: As for `RopeConfig.from_hf`.
    """
    given = config.get("rope_parameters")
    plain = {
        key: value
        for key, value in config.items()
        if key not in ("rope_scaling", "rope_parameters", "rope_theta")
    }
    own: Mapping[str, Any] = {FULL: config.get("rope_scaling") or given}
    if isinstance(given, Mapping) and FULL in given:
        own = given
    return {
        kind: RopeConfig.from_hf(
            {**plain, "rope_theta": thetas[kind], "rope_parameters": own.get(kind)}
        )
        for kind in (FULL, SLIDING)
    }
