"""Qwen3, dense: a decoder whose queries and keys are normalised per head.

Source: Qwen3 Technical Report, arXiv:2505.09388.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import AttentionConfig, HeadNormConfig
from jllm.models.hf_config import read_flag, with_defaults
from jllm.models.hf_decoder import read_decoder, with_upper_windows


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Qwen3 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    config = with_defaults(config, {"head_dim": 128})
    shape = with_upper_windows(read_decoder(config), config)
    bias = read_flag(config, "attention_bias", False)
    attention = AttentionConfig(
        qkv_bias=bias, out_bias=bias, head_norms=HeadNormConfig(kind=shape.norm)
    )
    return Decoder(dataclasses.replace(shape, attention=attention), options)
