"""Qwen3, dense: a decoder whose queries and keys are normalised per head.

Source: Qwen3 Technical Report, arXiv:2505.09388.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import AttentionConfig, DecoderConfig, HeadNormConfig
from jllm.models.hf_config import (
    FULL,
    SLIDING,
    read_flag,
    read_integer,
    read_layer_types,
)
from jllm.models.hf_decoder import read_decoder, read_window, with_windows


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Qwen3 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    config = {"head_dim": 128, **config}
    shape = with_upper_windows(read_decoder(config), config)
    bias = read_flag(config, "attention_bias", False)
    attention = AttentionConfig(
        qkv_bias=bias, out_bias=bias, head_norms=HeadNormConfig(kind=shape.norm)
    )
    return Decoder(dataclasses.replace(shape, attention=attention), options)


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
