"""GPT-NeoX and Pythia: parallel halves with a layer norm each, a quarter rotated.

Source: GPT-NeoX-20B, arXiv:2204.06745; Pythia, arXiv:2304.01373.
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
    read_flag,
    read_number,
    require_value,
    with_defaults,
)
from jllm.models.hf_decoder import read_decoder


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a GPT-NeoX config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    require_value(config, "num_key_value_heads", (config.get("num_attention_heads"),))
    shape = read_decoder(
        with_defaults(
            config,
            {
                "rope_theta": config.get("rotary_emb_base", 10_000.0),
                "partial_rotary_factor": config.get("rotary_pct", 0.25),
            },
        )
    )
    bias = read_flag(config, "attention_bias", True)
    shape = dataclasses.replace(
        shape,
        norm=NormKind(
            read_number(config, "layer_norm_eps", 1e-5), centred=True, bias=True
        ),
        mlp=MlpConfig(
            shape.mlp.width,
            read_activation(config, "hidden_act", "gelu"),
            gated=False,
            bias=True,
        ),
        attention=AttentionConfig(qkv_bias=bias, out_bias=bias),
        block=BlockConfig(parallel=read_flag(config, "use_parallel_residual", True)),
        names=Names(
            embed="gpt_neox.embed_in",
            layers="gpt_neox.layers",
            norm="gpt_neox.final_layer_norm",
            head="embed_out",
            qkv=("attention.query_key_value",),
            out="attention.dense",
            up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
            grouped=True,
        ),
    )
    return Decoder(shape, options)
