"""Granite 3: Llama with factors on embeddings, scores, residual and logits.

Source: Granite 3.0 Language Models, IBM, 2024; scales as in arXiv:2203.03466.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import AttentionConfig, BlockConfig
from jllm.models.hf_config import read_flag, read_number
from jllm.models.hf_decoder import read_decoder


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Granite config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    shape = read_decoder(config)
    bias = read_flag(config, "attention_bias", False)
    mlp_bias = read_flag(config, "mlp_bias", False)
    shape = dataclasses.replace(
        shape,
        mlp=dataclasses.replace(shape.mlp, bias=mlp_bias),
        attention=AttentionConfig(
            scale=read_number(config, "attention_multiplier", 1.0),
            qkv_bias=bias,
            out_bias=bias,
        ),
        block=BlockConfig(
            residual_scale=read_number(config, "residual_multiplier", 1.0)
        ),
        embedding=dataclasses.replace(
            shape.embedding,
            scale=read_number(config, "embedding_multiplier", 1.0),
            logit_scale=1 / read_number(config, "logits_scaling", 1.0),
        ),
    )
    return Decoder(shape, options)
