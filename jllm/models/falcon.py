"""Falcon: attention and MLP in parallel, few KV heads, fused in the checkpoint.

Source: The Falcon Series of Open Language Models, arXiv:2311.16867.
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
    """The decoder that a Falcon config.json describes.

    Raises:
        UnsupportedModelError: A value is missing or not supported.
        ConfigError: The options do not fit the model's shape.
    """
    require_value(config, "head_dim", ())
    # Trained with slopes times positions in bfloat16, which no kernel rounds alike.
    require_value(config, "alibi", (False,))
    width = read_integer(config, "hidden_size")
    shape = read_decoder(
        {
            **config,
            "num_key_value_heads": _num_kv_heads(config),
            "intermediate_size": read_integer(config, "ffn_hidden_size", 4 * width),
        }
    )
    bias = read_flag(config, "bias", False)
    attention = AttentionConfig(qkv_bias=bias, out_bias=bias)
    shape = dataclasses.replace(
        shape,
        norm=NormKind(
            read_number(config, "layer_norm_epsilon", 1e-5), centred=True, bias=True
        ),
        mlp=MlpConfig(
            shape.mlp.width,
            read_activation(config, "activation", "gelu"),
            gated=False,
            bias=bias,
        ),
        attention=attention,
        block=_block(config),
        embedding=EmbeddingConfig(tied=read_flag(config, "tie_word_embeddings", True)),
        names=Names(
            embed="transformer.word_embeddings",
            layers="transformer.h",
            norm="transformer.ln_f",
            qkv=("self_attention.query_key_value",),
            out="self_attention.dense",
            up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
            grouped=True,
        ),
    )
    return Decoder(shape, options)


def _num_kv_heads(config: Mapping[str, Any]) -> int:
    """The key is there in all generations, but means something in the newer only."""
    num_heads = read_integer(config, "num_attention_heads")
    if read_flag(config, "new_decoder_architecture", False):
        return read_integer(config, "num_kv_heads", num_heads)
    return 1 if read_flag(config, "multi_query", True) else num_heads


def _block(config: Mapping[str, Any]) -> BlockConfig:
    """One norm or two before the parallel halves; the oldest have one half first."""
    is_new = read_flag(config, "new_decoder_architecture", False)
    if not is_new and not read_flag(config, "parallel_attn", True):
        return BlockConfig()
    if is_new:
        require_value(config, "parallel_attn", (True,))
    norms = read_integer(config, "num_ln_in_parallel_attn", 2 if is_new else 1, high=2)
    if norms == 2:
        if not is_new:
            require_value(config, "num_ln_in_parallel_attn", (1,))
        return BlockConfig("ln_attn", before_mlp="ln_mlp", parallel=True)
    return BlockConfig(before_mlp=None, parallel=True)
