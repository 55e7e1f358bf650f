"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values.

Source: Qwen2 Technical Report, arXiv:2407.10671; Qwen2.5, arXiv:2412.15115.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import AttentionConfig
from jllm.models.hf_decoder import read_decoder, with_upper_windows


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Qwen2 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    shape = with_upper_windows(read_decoder(config), config)
    shape = dataclasses.replace(shape, attention=AttentionConfig(qkv_bias=True))
    return Decoder(shape, options)
