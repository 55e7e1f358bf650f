"""Cohere Command R: attention and MLP in parallel, layer norms, pairs of neighbours.

Source: Command R, docs.cohere.com/docs/command-r; parallel layers, arXiv:2204.02311.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.layers.norm import NormKind
from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import (
    AttentionConfig,
    BlockConfig,
    DecoderConfig,
    EmbeddingConfig,
    HeadNormConfig,
)
from jllm.models.hf_config import read_flag, read_number
from jllm.models.hf_decoder import read_decoder


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Cohere config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    shape = read_cohere({"rope_theta": 500_000.0, **config})
    if read_flag(config, "use_qk_norm", False):
        norms = HeadNormConfig(over="each", kind=shape.norm)
        attention = dataclasses.replace(shape.attention, head_norms=norms)
        shape = dataclasses.replace(shape, attention=attention)
    return Decoder(shape, options)


def read_cohere(config: Mapping[str, Any]) -> DecoderConfig:
    """What Command R and R7B share.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
    """
    bias = read_flag(config, "attention_bias", False)
    return dataclasses.replace(
        read_decoder(config),
        norm=NormKind(read_number(config, "layer_norm_eps", 1e-5), centred=True),
        attention=AttentionConfig(qkv_bias=bias, out_bias=bias, interleaved=True),
        block=BlockConfig(before_mlp=None, parallel=True),
        embedding=EmbeddingConfig(
            tied=read_flag(config, "tie_word_embeddings", True),
            logit_scale=read_number(config, "logit_scale", 0.0625),
        ),
    )
