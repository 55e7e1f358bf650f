"""The weights of a dense decoder, each declared once under its checkpoint name."""

from collections.abc import Sequence
from typing import Any

from jllm.models.base import ParamSpec, Part
from jllm.models.decoder_config import DecoderConfig, HeadNormConfig


def decoder_specs(
    config: DecoderConfig,
    *,
    num_kv_heads: int,
    padded_vocab_size: int,
    num_shards: int,
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The tree of all parameters.

    Args:
        config: Shape of the decoder.
        num_kv_heads: KV heads of the pool, a multiple of the model's.
        padded_vocab_size: Rows of the embedding table and the head.
        num_shards: Devices that share each layer.
        layers: Numbers of the layers, None for all.
    """
    names, embedding = config.names, config.embedding
    numbers = range(config.num_layers) if layers is None else layers
    prefixes = [f"{names.layers}.{i}." for i in numbers]
    norms = [prefix + name for prefix in prefixes for name in config.block.norms]
    norms.append(names.norm)
    tree: dict[str, Any] = {
        "embed": _table(config, names.embed, padded_vocab_size),
        "norms": _norm_vectors(config, norms, "weight"),
        "layers": [
            _attention(config, prefix, num_kv_heads)
            | _head_norms(config, prefix, num_kv_heads)
            | _mlp(config, prefix, num_shards)
            for prefix in prefixes
        ],
    }
    if config.norm.bias:
        tree["norm_biases"] = _norm_vectors(config, norms, "bias")
    head_norms = config.attention.head_norms
    if head_norms is not None and head_norms.over == "head":
        pairs = [prefix + name for prefix in prefixes for name in head_norms.names]
        init = _norm_init(head_norms.kind.weight_offset)
        tree["qk_norms"] = _vectors(config.head_dim, pairs, "weight", init)
    if embedding.positions is not None:
        shape = (embedding.positions, config.width)
        part = Part(f"{names.positions}.weight", shape=shape)
        tree["positions"] = ParamSpec(shape, (None, None), (part,))
    if not embedding.tied:
        tree["head"] = _table(config, names.head, padded_vocab_size)
    if embedding.head_bias:
        part = Part(f"{names.head}.bias", shape=(config.vocab_size,))
        tree["head_bias"] = ParamSpec(
            (padded_vocab_size,), ("vocab",), (part,), init="zeros", pad_axis=0
        )
    return tree


def _table(config: DecoderConfig, name: str, padded_vocab_size: int) -> ParamSpec:
    """A matrix with one row per token."""
    part = Part(f"{name}.weight", shape=(config.vocab_size, config.width))
    shape = (padded_vocab_size, config.width)
    return ParamSpec(shape, ("vocab", None), (part,), pad_axis=0)


def _norm_vectors(config: DecoderConfig, names: list[str], kind: str) -> ParamSpec:
    init = "zeros" if kind == "bias" else _norm_init(config.norm.weight_offset)
    return _vectors(config.width, names, kind, init)


def _norm_init(weight_offset: int) -> str:
    """With an offset of one, no weight is a zero."""
    return "zeros" if weight_offset else "ones"


def _vectors(width: int, names: list[str], kind: str, init: str) -> ParamSpec:
    """The vectors of many norms, stacked into one leaf."""
    parts = tuple(Part(f"{name}.{kind}", shape=(width,)) for name in names)
    return ParamSpec((len(parts), width), (None, None), parts, init=init)


def _attention(
    config: DecoderConfig, prefix: str, num_kv_heads: int
) -> dict[str, ParamSpec]:
    """Fused q, k, v and the output projection.

    The fused weight has one group of rows per KV head: its query heads, its key, its
    value. Sharding the first axis keeps each query head with its own KV head.
    """
    head_dim, width, names = config.head_dim, config.width, config.names
    q_rows = config.num_heads * head_dim
    group_rows = (config.num_heads // num_kv_heads + 2) * head_dim

    def fused(kind: str, columns: tuple[int, ...], init: str) -> ParamSpec:
        parts = _qkv_parts(config, prefix, kind, num_kv_heads)
        axes = ("kv_heads", None, *(None for _ in columns))
        shape = (num_kv_heads, group_rows, *columns)
        return ParamSpec(shape, axes, parts, concat_axis=1, init=init)

    specs = {
        "qkv": fused("weight", (width,), "normal"),
        "out": _projection(config, prefix + names.out, (width, q_rows), "heads"),
    }
    if config.attention.qkv_bias:
        specs["qkv_bias"] = fused("bias", (), "zeros")
    if config.attention.out_bias:
        specs["out_bias"] = _bias(prefix + names.out, width)
    return specs


def _qkv_parts(
    config: DecoderConfig, prefix: str, kind: str, num_kv_heads: int
) -> tuple[Part, ...]:
    """Where the rows of q, k and v are in the checkpoint."""
    names, first_name = config.names, config.names.qkv[0]
    copies = num_kv_heads // config.num_kv_heads
    repeats = (1, copies, copies)
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    sizes = (q_rows, kv_rows, kv_rows)
    is_transposed = names.transposed and kind == "weight"

    def stored(rows: int) -> tuple[int, ...]:
        columns = (config.width,) if kind == "weight" else ()
        return (*columns, rows) if is_transposed else (rows, *columns)

    if len(names.qkv) > 1:
        return tuple(
            Part(f"{prefix}{name}.{kind}", repeat, stored(size), is_transposed)
            for name, repeat, size in zip(names.qkv, repeats, sizes, strict=True)
        )
    groups = config.num_kv_heads if names.grouped else 1
    whole, parts, start = stored(sum(sizes)), list[Part](), 0
    for repeat, size in zip(repeats, sizes, strict=True):
        rows = (start, start + size // groups)
        name = f"{prefix}{first_name}.{kind}"
        parts.append(Part(name, repeat, whole, is_transposed, groups, rows))
        start = rows[1]
    return tuple(parts)


def _head_norms(
    config: DecoderConfig, prefix: str, num_kv_heads: int
) -> dict[str, ParamSpec]:
    """The norms of q and k, where the heads do not share one weight."""
    norms = config.attention.head_norms
    if norms is None or norms.over == "head":
        return {}
    q, keys = (prefix + name for name in norms.names)
    heads, kv_heads = config.num_heads, config.num_kv_heads
    return {
        "q_norm": _head_norm(config, norms, q, (heads, heads), "heads"),
        "k_norm": _head_norm(config, norms, keys, (kv_heads, num_kv_heads), "kv_heads"),
    }


def _head_norm(
    config: DecoderConfig,
    norms: HeadNormConfig,
    name: str,
    heads: tuple[int, int],
    axis: str,
) -> ParamSpec:
    """One of them, `[heads, D]`, for so many heads stored and so many used."""
    stored, used = heads
    width = config.head_dim
    parts: tuple[Part, ...]
    if norms.listed:
        owners = (i * stored // used for i in range(used))
        parts = tuple(Part(f"{name}.{i}.weight", shape=(width,)) for i in owners)
    else:
        shape = (stored * width,) if norms.over == "all" else (stored, width)
        parts = (Part(f"{name}.weight", used // stored, shape),)
    return ParamSpec((used, width), (axis, None), parts, init="ones")


def _mlp(config: DecoderConfig, prefix: str, num_shards: int) -> dict[str, ParamSpec]:
    """The projections into the MLP and the one out of it."""
    width, mlp, names = config.width, config.mlp, config.names
    specs = (
        _gate_up(config, prefix, num_shards) if mlp.gated else _plain_up(config, prefix)
    )
    shape = (width, mlp.width)
    specs["down"] = _projection(config, prefix + names.down, shape, "mlp")
    if mlp.bias:
        specs["down_bias"] = _bias(prefix + names.down, width)
    return specs


def _gate_up(
    config: DecoderConfig, prefix: str, num_shards: int
) -> dict[str, ParamSpec]:
    """Fused gate and up.

    Each device's shares of gate and up lie together, so that the fused weight is one
    matrix of which a device holds consecutive rows.
    """
    names, mlp_width = config.names.up, config.mlp.width
    first_name = names[0]

    def fused(kind: str, columns: tuple[int, ...], init: str) -> ParamSpec:
        if len(names) > 1:
            parts = tuple(
                Part(f"{prefix}{name}.{kind}", shape=(mlp_width, *columns))
                for name in names
            )
        else:
            whole = (2 * mlp_width, *columns)
            parts = tuple(
                Part(f"{prefix}{first_name}.{kind}", shape=whole, rows=rows)
                for rows in ((0, mlp_width), (mlp_width, 2 * mlp_width))
            )
        axes = ("mlp", None, None, *(None for _ in columns))
        shape = (num_shards, 2, mlp_width // num_shards, *columns)
        return ParamSpec(shape, axes, parts, concat_axis=1, init=init)

    specs = {"gate_up": fused("weight", (config.width,), "normal")}
    if config.mlp.bias:
        specs["gate_up_bias"] = fused("bias", (), "zeros")
    return specs


def _plain_up(config: DecoderConfig, prefix: str) -> dict[str, ParamSpec]:
    name, mlp_width = prefix + config.names.up[0], config.mlp.width
    shape = (mlp_width, config.width)
    specs = {"up": _projection(config, name, shape, None, rows="mlp")}
    if config.mlp.bias:
        part = Part(f"{name}.bias", shape=(mlp_width,))
        specs["up_bias"] = ParamSpec((mlp_width,), ("mlp",), (part,), init="zeros")
    return specs


def _projection(
    config: DecoderConfig,
    name: str,
    shape: tuple[int, int],
    columns: str | None,
    rows: str | None = None,
) -> ParamSpec:
    """A projection `[outputs, inputs]`, however the checkpoint has it."""
    is_transposed = config.names.transposed
    stored = shape[::-1] if is_transposed else shape
    part = Part(f"{name}.weight", shape=stored, transposed=is_transposed)
    return ParamSpec(shape, (rows, columns), (part,))


def _bias(name: str, width: int) -> ParamSpec:
    part = Part(f"{name}.bias", shape=(width,))
    return ParamSpec((width,), (None,), (part,), init="zeros")
