"""Llama 1 to 3.3: the plain decoder.

Source: LLaMA, arXiv:2302.13971; The Llama 3 Herd of Models, arXiv:2407.21783.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import AttentionConfig
from jllm.models.hf_config import read_flag, require_value
from jllm.models.hf_decoder import read_decoder


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Llama config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    require_value(config, "pretraining_tp", (1,))
    shape = read_decoder(config)
    bias = read_flag(config, "attention_bias", False)
    mlp_bias = read_flag(config, "mlp_bias", False)
    shape = dataclasses.replace(
        shape,
        attention=AttentionConfig(qkv_bias=bias, out_bias=bias),
        mlp=dataclasses.replace(shape.mlp, bias=mlp_bias),
    )
    return Decoder(shape, options)
