"""InternLM3: Llama with two switches for biases.

Source: InternLM3, github.com/InternLM/InternLM.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import AttentionConfig
from jllm.models.hf_config import read_flag
from jllm.models.hf_decoder import read_decoder


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a InternLM3 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    shape = read_decoder(config)
    bias = read_flag(config, "bias", False)
    attention = AttentionConfig(
        qkv_bias=read_flag(config, "qkv_bias", False), out_bias=bias
    )
    mlp = dataclasses.replace(shape.mlp, bias=bias)
    shape = dataclasses.replace(shape, attention=attention, mlp=mlp)
    return Decoder(shape, options)
