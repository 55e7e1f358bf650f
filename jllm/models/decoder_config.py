"""The shape of a dense decoder, as a family reads it from a config.json."""

import dataclasses

from jllm.layers.rope import RopeConfig


@dataclasses.dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape of a dense decoder.

    Attributes:
        vocab_size: Token ids.
        width: Model width `E`.
        num_layers: Layers `L`.
        num_heads: Query heads `H`.
        num_kv_heads: KV heads `K`, a divisor of `H`.
        head_dim: Head width `D`.
        mlp_width: MLP width `F`.
        norm_epsilon: Added to the mean square before the root.
        rope: Rotary position embedding.
        max_position_embeddings: Longest context that the model was made for.
        tie_embeddings: Whether the output head is the embedding table.
        qkv_bias: Whether q, k and v projections have a bias.
        out_bias: Whether the attention output projection has one.
        mlp_bias: Whether the MLP projections have one.
        qk_norm: Whether q and k are normalised per head before RoPE.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm_epsilon: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
