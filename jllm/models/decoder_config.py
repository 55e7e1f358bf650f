"""The shape of a dense decoder, as a family reads it from a config.json."""

import dataclasses
from typing import Literal

from jllm.layers.activation import Activation
from jllm.layers.norm import NormKind
from jllm.layers.rope import RopeConfig


@dataclasses.dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer.

    Attributes:
        rope: Rotary position embedding; None where queries and keys are not rotated.
        window: Newest positions that a query sees, itself included; None for all.
    """

    rope: RopeConfig | None
    window: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class BlockConfig:
    """How attention, MLP, norms and residual are wired in a layer.

    Norms are named as in the checkpoint, below the layer; None for none.

    Attributes:
        before_attention: Norm of the attention's input.
        after_attention: Norm of its output, before it is added to the residual.
        before_mlp: Norm of the MLP's input.
        after_mlp: Norm of its output.
        parallel: Whether the MLP reads what the attention reads, rather than the sum;
            without a norm of its own it shares the attention's.
        residual_scale: Factor on both outputs.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    parallel: bool = False
    residual_scale: float = 1.0

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms that there are, in the order of their weights."""
        places = (
            self.before_attention,
            self.after_attention,
            self.before_mlp,
            self.after_mlp,
        )
        return tuple(name for name in places if name is not None)


@dataclasses.dataclass(frozen=True, slots=True)
class HeadNormConfig:
    """Norms of queries and keys before they are rotated.

    Attributes:
        over: "head" for one weight that all heads share, "each" for a weight of its own
            per head, "all" for a mean over the features of all heads.
        kind: Which norm.
        names: Names of the two in the checkpoint, below the layer.
        listed: Whether each head's weight is a tensor, numbered from zero.
    """

    over: Literal["head", "each", "all"] = "head"
    kind: NormKind = dataclasses.field(default_factory=NormKind)
    names: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    listed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionConfig:
    """What an attention layer does beside its heads.

    Attributes:
        scale: Factor on the scores; None for the width of a head to the power -0.5.
        soft_cap: Bound of the scores; None for none.
        qkv_bias: Whether q, k and v projections have a bias.
        out_bias: Whether the output projection has one.
        head_norms: Norms of queries and keys; None for none.
        interleaved: Whether RoPE turns feature 2 i with 2 i + 1, rather than i with the
            one half a head further.
    """

    scale: float | None = None
    soft_cap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    head_norms: HeadNormConfig | None = None
    interleaved: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class MlpConfig:
    """The feed-forward half of a layer.

    Attributes:
        width: Its width `F`.
        activation: Function between its products.
        gated: Whether a second projection multiplies the activated first one.
        bias: Whether its projections have biases.
    """

    width: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddingConfig:
    """What is before the first layer and after the last.

    Attributes:
        tied: Whether the output head is the embedding table.
        scale: Factor on the embeddings.
        positions: Rows of the table of learned positions; None without one.
        head_bias: Whether the output head has a bias.
        logit_scale: Factor on the scores.
        soft_cap: Bound of the scores; None for none.
    """

    tied: bool = False
    scale: float = 1.0
    positions: int | None = None
    head_bias: bool = False
    logit_scale: float = 1.0
    soft_cap: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Names:
    """What a checkpoint calls the tensors, without `.weight` and `.bias`.

    Attributes:
        embed: Embedding table.
        positions: Table of learned positions.
        layers: What the number of a layer is appended to.
        norm: Norm after the last layer.
        head: Output head.
        qkv: Projections of q, k and v below a layer; one name where they are fused.
        out: Output projection of the attention.
        up: Projections of the gate and of what it multiplies, one name where they are
            fused; the only projection into an MLP without a gate.
        down: Projection out of the MLP.
        grouped: Whether a fused q, k and v has the rows of one KV head together, rather
            than all queries first.
        transposed: Whether projections lie inputs first.
    """

    embed: str = "model.embed_tokens"
    positions: str = "model.embed_positions"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    grouped: bool = False
    transposed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape of a dense decoder.

    Attributes:
        vocab_size: Token ids.
        width: Model width `E`.
        num_heads: Query heads `H`.
        num_kv_heads: KV heads `K`, a divisor of `H`.
        head_dim: Head width `D`.
        layers: What may differ between the layers, for each of them.
        norm: Kind of the norms of the hidden states.
        mlp: Feed-forward half of a layer.
        attention: Attention half of a layer.
        block: Wiring of a layer.
        embedding: First and last steps.
        names: Names in the checkpoint.
    """

    vocab_size: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    norm: NormKind
    mlp: MlpConfig
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    block: BlockConfig = dataclasses.field(default_factory=BlockConfig)
    embedding: EmbeddingConfig = dataclasses.field(default_factory=EmbeddingConfig)
    names: Names = dataclasses.field(default_factory=Names)

    @property
    def num_layers(self) -> int:
        """Layers `L`."""
        return len(self.layers)
