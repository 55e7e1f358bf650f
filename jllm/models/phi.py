"""Phi 1, 1.5 and 2: parallel halves that share a layer norm, biases everywhere.

Source: Textbooks Are All You Need, arXiv:2306.11644 and arXiv:2309.05463.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.layers.norm import NormKind
from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import AttentionConfig, BlockConfig, MlpConfig, Names
from jllm.models.hf_config import (
    read_activation,
    read_number,
    require_value,
    with_defaults,
)
from jllm.models.hf_decoder import read_decoder


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a Phi config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    require_value(config, "qk_layernorm", (False,))
    shape = read_decoder(
        with_defaults(config, {"partial_rotary_factor": 0.5, "hidden_act": "gelu_new"})
    )
    shape = dataclasses.replace(
        shape,
        norm=NormKind(
            read_number(config, "layer_norm_eps", 1e-5), centred=True, bias=True
        ),
        mlp=MlpConfig(
            shape.mlp.width,
            read_activation(config, "hidden_act", "gelu_new"),
            gated=False,
            bias=True,
        ),
        attention=AttentionConfig(qkv_bias=True, out_bias=True),
        block=BlockConfig(before_mlp=None, parallel=True),
        embedding=dataclasses.replace(shape.embedding, head_bias=True),
        names=Names(
            norm="model.final_layernorm",
            out="self_attn.dense",
            up=("mlp.fc1",),
            down="mlp.fc2",
        ),
    )
    return Decoder(shape, options)
