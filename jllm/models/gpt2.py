"""GPT-2: learned positions, layer norms, projections stored inputs first.

Source: Language Models are Unsupervised Multitask Learners, Radford and others, 2019.
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
    EmbeddingConfig,
    LayerConfig,
    MlpConfig,
    Names,
)
from jllm.models.hf_config import (
    read_activation,
    read_flag,
    read_integer,
    read_number,
    require_value,
)
from jllm.models.hf_decoder import read_decoder


def make(config: Mapping[str, Any], options: ModelOptions) -> Decoder:
    """The decoder that a GPT-2 config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    require_value(config, "scale_attn_weights", (True,))
    require_value(config, "scale_attn_by_inverse_layer_idx", (False,))
    require_value(config, "add_cross_attention", (False,))
    width = read_integer(config, "n_embd", 768)
    shape = read_decoder(
        {
            "vocab_size": config.get("vocab_size"),
            "hidden_size": width,
            "num_hidden_layers": read_integer(config, "n_layer", 12),
            "num_attention_heads": read_integer(config, "n_head", 12),
            "intermediate_size": read_integer(config, "n_inner", 4 * width),
        }
    )
    shape = dataclasses.replace(
        shape,
        layers=(LayerConfig(rope=None),) * shape.num_layers,
        norm=NormKind(
            read_number(config, "layer_norm_epsilon", 1e-5), centred=True, bias=True
        ),
        mlp=MlpConfig(
            shape.mlp.width,
            read_activation(config, "activation_function", "gelu_new"),
            gated=False,
            bias=True,
        ),
        attention=AttentionConfig(qkv_bias=True, out_bias=True),
        block=BlockConfig("ln_1", before_mlp="ln_2"),
        embedding=EmbeddingConfig(
            tied=read_flag(config, "tie_word_embeddings", True),
            positions=read_integer(config, "n_positions", 1024),
        ),
        names=Names(
            embed="transformer.wte",
            positions="transformer.wpe",
            layers="transformer.h",
            norm="transformer.ln_f",
            qkv=("attn.c_attn",),
            out="attn.c_proj",
            up=("mlp.c_fc",),
            down="mlp.c_proj",
            transposed=True,
        ),
    )
    return Decoder(shape, options)
