"""SmolLM3: Llama whose every fourth layer has no positions.

Sources: SmolLM3, huggingface.co/blog/smollm3; layers without positions,
arXiv:2501.18795.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.errors import UnsupportedModelError
from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import AttentionConfig, LayerConfig
from jllm.models.hf_config import (
    FULL,
    SLIDING,
    read_flag,
    read_integer,
    read_layer_types,
    with_defaults,
)
from jllm.models.hf_decoder import read_decoder, read_window, with_windows


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a SmolLM3 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    shape = read_decoder(with_defaults(config, {"tie_word_embeddings": True}))
    rotated = _rotated_layers(config, shape.num_layers)
    bias = read_flag(config, "attention_bias", False)
    mlp_bias = read_flag(config, "mlp_bias", False)
    shape = dataclasses.replace(
        shape,
        layers=tuple(
            layer if is_rotated else LayerConfig(rope=None)
            for layer, is_rotated in zip(shape.layers, rotated, strict=True)
        ),
        attention=AttentionConfig(qkv_bias=bias, out_bias=bias),
        mlp=dataclasses.replace(shape.mlp, bias=mlp_bias),
    )
    if read_flag(config, "use_sliding_window", False):
        default = [FULL if is_rotated else SLIDING for is_rotated in rotated]
        types = read_layer_types(config, default)
        shape = with_windows(shape, read_window(config), types)
    return Decoder(shape, options)


def _rotated_layers(config: Mapping[str, Any], num_layers: int) -> list[bool]:
    """Whether each layer rotates queries and keys, as `no_rope_layers` says by a one.

    Raises:
        UnsupportedModelError: Not a zero or one for each layer.
    """
    interval = read_integer(config, "no_rope_layer_interval", 4)
    default = [int((i + 1) % interval != 0) for i in range(num_layers)]
    flags = config.get("no_rope_layers")
    flags = default if flags is None else flags
    if (
        not isinstance(flags, list)
        or len(flags) != num_layers
        or any(flag not in (0, 1) for flag in flags)
    ):
        raise UnsupportedModelError(
            f"config.json: no_rope_layers={flags!r} must be a list of {num_layers} "
            f"zeros and ones, one for each layer"
        )
    return [flag == 1 for flag in flags]
