"""The weights of a dense decoder, each declared once under its checkpoint name."""

from typing import Any

from jllm.models.base import ParamSpec, Part
from jllm.models.decoder_config import DecoderConfig


def decoder_specs(
    config: DecoderConfig,
    *,
    num_kv_heads: int,
    padded_vocab_size: int,
    num_shards: int,
) -> dict[str, Any]:
    """The tree of all parameters.

    Args:
        config: Shape of the decoder.
        num_kv_heads: KV heads of the pool, a multiple of the model's.
        padded_vocab_size: Rows of the embedding table and the head.
        num_shards: Devices that share each layer.
    """
    layers = range(config.num_layers)
    tree: dict[str, Any] = {
        "embed": _table(config, "model.embed_tokens", padded_vocab_size),
        "norms": _vectors(
            config.width,
            *(
                f"model.layers.{i}.{name}"
                for i in layers
                for name in ("input_layernorm", "post_attention_layernorm")
            ),
            "model.norm",
        ),
        "layers": [
            _attention(config, f"model.layers.{i}.self_attn", num_kv_heads)
            | _mlp(config, f"model.layers.{i}.mlp", num_shards)
            for i in layers
        ],
    }
    if config.qk_norm:
        tree["qk_norms"] = _vectors(
            config.head_dim,
            *(
                f"model.layers.{i}.self_attn.{name}"
                for i in layers
                for name in ("q_norm", "k_norm")
            ),
        )
    if not config.tie_embeddings:
        tree["head"] = _table(config, "lm_head", padded_vocab_size)
    return tree


def _table(config: DecoderConfig, name: str, padded_vocab_size: int) -> ParamSpec:
    """A matrix with one row per token."""
    part = Part(f"{name}.weight", shape=(config.vocab_size, config.width))
    shape = (padded_vocab_size, config.width)
    return ParamSpec(shape, ("vocab", None), (part,), pad_axis=0)


def _vectors(width: int, *names: str) -> ParamSpec:
    """The vectors of many norms, stacked into one leaf."""
    parts = tuple(Part(f"{name}.weight", shape=(width,)) for name in names)
    return ParamSpec((len(parts), width), (None, None), parts, init="ones")


def _attention(
    config: DecoderConfig, prefix: str, num_kv_heads: int
) -> dict[str, ParamSpec]:
    """Fused q, k, v and the output projection.

    The fused weight has one group of rows per KV head: its query heads, its key, its
    value. Sharding the first axis keeps each query head with its own KV head.
    """
    head_dim, width = config.head_dim, config.width
    q_rows = config.num_heads * head_dim
    kv_rows = config.num_kv_heads * head_dim
    copies = num_kv_heads // config.num_kv_heads
    group_rows = (config.num_heads // num_kv_heads + 2) * head_dim

    def fused(kind: str, columns: tuple[int, ...], init: str) -> ParamSpec:
        parts = (
            Part(f"{prefix}.q_proj.{kind}", shape=(q_rows, *columns)),
            Part(f"{prefix}.k_proj.{kind}", copies, (kv_rows, *columns)),
            Part(f"{prefix}.v_proj.{kind}", copies, (kv_rows, *columns)),
        )
        axes = ("kv_heads", None, *(None for _ in columns))
        shape = (num_kv_heads, group_rows, *columns)
        return ParamSpec(shape, axes, parts, concat_axis=1, init=init)

    specs = {
        "qkv": fused("weight", (width,), "normal"),
        "out": _matrix(f"{prefix}.o_proj", (width, q_rows), "heads"),
    }
    if config.qkv_bias:
        specs["qkv_bias"] = fused("bias", (), "zeros")
    if config.out_bias:
        specs["out_bias"] = _bias(f"{prefix}.o_proj", width)
    return specs


def _mlp(config: DecoderConfig, prefix: str, num_shards: int) -> dict[str, ParamSpec]:
    """Fused gate and up, and the down projection.

    Each device's shares of gate and up lie together, so that the fused weight is one
    matrix of which a device holds consecutive rows.
    """
    width, mlp_width = config.width, config.mlp_width

    def fused(kind: str, columns: tuple[int, ...], init: str) -> ParamSpec:
        parts = tuple(
            Part(f"{prefix}.{name}.{kind}", shape=(mlp_width, *columns))
            for name in ("gate_proj", "up_proj")
        )
        axes = ("mlp", None, None, *(None for _ in columns))
        shape = (num_shards, 2, mlp_width // num_shards, *columns)
        return ParamSpec(shape, axes, parts, concat_axis=1, init=init)

    specs = {
        "gate_up": fused("weight", (width,), "normal"),
        "down": _matrix(f"{prefix}.down_proj", (width, mlp_width), "mlp"),
    }
    if config.mlp_bias:
        specs["gate_up_bias"] = fused("bias", (), "zeros")
        specs["down_bias"] = _bias(f"{prefix}.down_proj", width)
    return specs


def _matrix(name: str, shape: tuple[int, int], columns: str) -> ParamSpec:
    """A projection whose inputs are shared between devices."""
    return ParamSpec(shape, (None, columns), (Part(f"{name}.weight", shape=shape),))


def _bias(name: str, width: int) -> ParamSpec:
    part = Part(f"{name}.bias", shape=(width,))
    return ParamSpec((width,), (None,), (part,), init="zeros")
