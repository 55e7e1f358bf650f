"""StarCoder2: layer norms, an MLP without gate, biases, a window.

Source: StarCoder 2 and The Stack v2, arXiv:2402.19173.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllm.layers.norm import NormKind
from jllm.models.base import ModelOptions
from jllm.models.decoder import Decoder
from jllm.models.decoder_config import AttentionConfig, MlpConfig, Names
from jllm.models.hf_config import read_activation, read_flag, read_number, with_defaults
from jllm.models.hf_decoder import read_decoder, read_window, with_windows


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a StarCoder2 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    shape = read_decoder(with_defaults(config, {"tie_word_embeddings": True}))
    bias = read_flag(config, "use_bias", True)
    shape = dataclasses.replace(
        shape,
        norm=NormKind(
            read_number(config, "norm_epsilon", 1e-5), centred=True, bias=True
        ),
        mlp=MlpConfig(
            shape.mlp.width,
            read_activation(config, "hidden_act", "gelu_pytorch_tanh"),
            gated=False,
            bias=bias,
        ),
        attention=AttentionConfig(qkv_bias=bias, out_bias=bias),
        names=Names(up=("mlp.c_fc",), down="mlp.c_proj"),
    )
    return Decoder(with_windows(shape, read_window(config)), options)
