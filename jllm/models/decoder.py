"""The configurable decoder that the dense families are instances of.

A family module turns a config.json into a `DecoderConfig`; everything else is here.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from jllm.errors import ConfigError
from jllm.layers.attention import (
    KV_HEADS,
    AttentionOptions,
    HeadNorms,
    Heads,
    cached_attention,
    explicit_attention,
    tile_layout,
)
from jllm.layers.embedding import embed, output_logits
from jllm.layers.kernels import TileLayout
from jllm.layers.linear import linear
from jllm.layers.mlp import gated_mlp, plain_mlp
from jllm.layers.norm import normalise, normalise_heads
from jllm.layers.rope import (
    RopeConfig,
    pairs_apart,
    rope_frequencies,
    rotation_of,
)
from jllm.models.alike import AlikeLayers
from jllm.models.base import (
    Batch,
    CacheGroup,
    KVCache,
    ModelOptions,
    Weights,
    group_layers,
)
from jllm.models.decoder_config import DecoderConfig
from jllm.models.decoder_specs import decoder_specs
from jllm.models.layer import Layer
from jllm.models.probe import Edits, Probe, activation_names

VOCAB_MULTIPLE = 512
"""The vocabulary is padded to a multiple of this, whatever the number of devices, since
a draw depends on the width of the logits."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A dense decoder: declared weights and pure functions over them.

    Attributes:
        config: Its shape.
        options: What the engine decided: types, mesh, kernels.
    """

    config: DecoderConfig
    options: ModelOptions

    def __post_init__(self) -> None:
        """Refuses a tensor-parallel size that the heads or the MLP cannot share."""
        size, config = self.options.tensor_size, self.config
        if config.num_heads % size or config.mlp.width % size:
            raise ConfigError(
                f"tensor_parallel_size={size} must divide the {config.num_heads} query "
                f"heads and the MLP width {config.mlp.width}"
            )
        if config.num_kv_heads % size and size % config.num_kv_heads:
            raise ConfigError(
                f"tensor_parallel_size={size} must divide the {config.num_kv_heads} KV "
                f"heads or be a multiple of them"
            )

    @property
    def width(self) -> int:
        """Length `E` of the hidden states."""
        return self.config.width

    @property
    def vocab_size(self) -> int:
        """Number of token ids, without padding."""
        return self.config.vocab_size

    @property
    def num_layers(self) -> int:
        """Number of leaves of the KV cache."""
        return self.config.num_layers

    @cached_property
    def cache_groups(self) -> tuple[CacheGroup, ...]:
        """Which leaves are kept for how long."""
        return group_layers(self.windows)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Newest positions that each layer's queries see; None for all of a context."""
        longest = self.options.max_model_len
        windows = (layer.window for layer in self.config.layers)
        return tuple(w if w is not None and w < longest else None for w in windows)

    @property
    def padded_vocab_size(self) -> int:
        """Width of the logits, which all devices share evenly."""
        sizes = (self.options.tensor_size, self.options.pipe_size)
        multiple = math.lcm(VOCAB_MULTIPLE, math.prod(sizes))
        return -(-self.config.vocab_size // multiple) * multiple

    @property
    def num_kv_heads(self) -> int:
        """KV heads in the pool: at least one per device, some of them copies."""
        return max(self.config.num_kv_heads, self.options.tensor_size)

    @property
    def group(self) -> int:
        """Query heads per KV head of the pool."""
        return self.config.num_heads // self.num_kv_heads

    def specs(self, layers: Sequence[int] | None = None) -> dict[str, Any]:
        """The tree of `ParamSpec` from which weights are loaded.

        Args:
            layers: Numbers of the layers in the checkpoint, None for all.
        """
        return decoder_specs(
            self.config,
            num_kv_heads=self.num_kv_heads,
            padded_vocab_size=self.padded_vocab_size,
            num_shards=self.options.tensor_size,
            layers=layers,
        )

    @property
    def kv_dtype(self) -> str:
        """Type of the KV pool."""
        return self.options.kv_dtype or self.options.dtype

    def kv_shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """Shape `(B, 2, K, P, D)` of one layer's pool, `D` perhaps padded."""
        multiple = self.options.kv_width_multiple
        width = -(-self.config.head_dim // multiple) * multiple
        return (num_blocks, 2, self.num_kv_heads, block_size, width)

    def tile_layout(self, block_size: int) -> TileLayout | None:
        """How `Batch.tiles` are cut; None where the batches have none."""
        pool = jax.ShapeDtypeStruct(self.kv_shape(1, block_size), self.kv_dtype)
        heads, dtype = self.config.num_heads, self.options.dtype
        return tile_layout(heads, dtype, pool, self._attention_options[0])

    def init_kv(self, num_blocks: int, block_size: int) -> KVCache:
        """An empty cache: zeros, since a NaN in an unused place would spread."""
        shape = self.kv_shape(num_blocks, block_size)
        mesh = self.options.mesh
        device = None if mesh is None else NamedSharding(mesh, KV_HEADS)
        return tuple(
            jnp.zeros(shape, self.kv_dtype, device=device)
            for _ in range(self.config.num_layers)
        )

    @property
    def activations(self) -> tuple[str, ...]:
        """Names that `capture` and `edit` of `forward` can mean, in order."""
        return activation_names(
            self.config.num_layers,
            has_middle=not self.config.block.parallel,
            has_mlp_norm=self._has_mlp_input,
        )

    @overload
    def forward(
        self,
        weights: Weights,
        kv: KVCache,
        batch: Batch,
        *,
        capture: None = None,
        edit: Edits | None = None,
    ) -> tuple[Float[Array, "T E"], KVCache]: ...

    @overload
    def forward(
        self,
        weights: Weights,
        kv: KVCache,
        batch: Batch,
        *,
        capture: Sequence[str],
        edit: Edits | None = None,
    ) -> tuple[Float[Array, "T E"], KVCache, dict[str, Array]]: ...

    def forward(
        self,
        weights: Weights,
        kv: KVCache,
        batch: Batch,
        *,
        capture: Sequence[str] | None = None,
        edit: Edits | None = None,
    ) -> Any:
        """Hidden states after the last norm, and the cache with the new tokens.

        Pure, and differentiable with `attention="reference"`.

        Args:
            weights: Arrays of the tree `specs`.
            kv: The cache, as `init_kv` makes it.
            batch: The tokens.
            capture: Names, or patterns of names, among `activations`; those come back
                as a third value, a dictionary from name to array.
            edit: Pure functions that change activations, by name or pattern.

        Raises:
            ValueError: A pattern matches no activation, or an edit changes a shape.
        """
        probe = Probe(self.activations, capture or (), edit)
        hidden = probe("embed", self.embedded(weights, batch))
        hidden, kv = self.run_layers(weights, hidden, kv, batch, probe)
        hidden = probe("final", self.final_norm(weights, hidden))
        return (hidden, kv) if capture is None else (hidden, kv, probe.captured)

    def embedded(self, weights: Weights, batch: Batch) -> Float[Array, "T E"]:
        """What the first layer reads."""
        embedding = self.config.embedding
        hidden = embed(weights["embed"], batch.tokens, embedding.scale)
        if embedding.positions is not None:
            hidden = hidden + embed(weights["positions"], batch.positions)
        return hidden

    def final_norm(
        self, weights: Weights, hidden: Float[Array, "T E"]
    ) -> Float[Array, "T E"]:
        """What `logits` reads, of what the last layer leaves."""
        return self._normed(weights, -1, hidden)

    def run_layers(
        self,
        weights: Weights,
        hidden: Float[Array, "T E"],
        kv: KVCache,
        batch: Batch,
        probe: Probe,
        takes_part: Sequence[Array | None] = (),
    ) -> tuple[Float[Array, "T E"], KVCache]:
        """All layers without what is before and after them.

        Args:
            weights: Arrays of the tree `specs`.
            hidden: What the first layer reads.
            kv: The cache.
            batch: The tokens.
            probe: Looks at the activations.
            takes_part: For each layer whether it changes the hidden states, as a
                boolean scalar; None, or nothing at all, where it always does.
        """
        rotations = {
            rope: rotation_of(batch.positions, *frequencies)
            for rope, frequencies in self._frequencies.items()
        }
        pools: list[Array] = []
        run_layer = AlikeLayers(self._layer, len(self.config.block.norms))
        group_of = {
            layer: index
            for index, group in enumerate(self.cache_groups)
            for layer in group.layers
        }
        for layer, pool in enumerate(kv):
            of_group = batch.of_group(group_of[layer])
            rope = self.config.layers[layer].rope
            rotation = None if rope is None else rotations[rope]
            own = Layer(layer, weights, of_group, rotation, probe)
            kind = self.config.layers[layer], self.windows[layer]
            changed, pool = run_layer(kind, own, hidden, pool)
            counts = takes_part[layer] if takes_part else None
            hidden = changed if counts is None else jnp.where(counts, changed, hidden)
            pools.append(pool)
        return hidden, tuple(pools)

    def logits(
        self, weights: Weights, hidden: Float[Array, "N E"]
    ) -> Float[Array, "N V"]:
        """Scores of the next token in float32; padded ids are minus infinity."""
        embedding = self.config.embedding
        return output_logits(
            weights["embed" if embedding.tied else "head"],
            hidden,
            self.config.vocab_size,
            bias=weights.get("head_bias"),
            scale=embedding.logit_scale,
            soft_cap=embedding.soft_cap,
        )

    def _layer(self, layer: Layer, hidden: Array, pool: Array) -> tuple[Array, Array]:
        block = self.config.block
        hidden = layer.probe("resid_in", hidden)
        with jax.named_scope("attention"):
            normed = self._norm(layer, block.before_attention, hidden)
            normed = layer.probe("attn.norm", normed)
            attended, pool = self._attend(layer, normed, pool)
            attended = layer.probe("attn.out", attended)
            attended = self._output(layer, block.after_attention, attended)
            if not block.parallel:
                hidden = self._replicate(hidden + attended)
                hidden = layer.probe("resid_mid", hidden)
        with jax.named_scope("mlp"):
            if self._has_mlp_input:
                normed = self._norm(layer, block.before_mlp, hidden)
                normed = layer.probe("mlp.norm", normed)
            out = layer.probe("mlp.out", self._mlp(layer.own, normed))
            out = self._output(layer, block.after_mlp, out)
            if block.parallel:
                out = attended + out
            hidden = self._replicate(hidden + out)
        return layer.probe("resid", hidden), pool

    def _attend(self, layer: Layer, normed: Array, pool: Array) -> tuple[Array, Array]:
        """Output of the attention [T, E], and the pool with the new tokens."""
        own = layer.own
        q, keys, values = self._project(own, normed)
        heads = Heads(
            layer.probe("attn.q", q),
            layer.probe("attn.k", keys),
            layer.probe("attn.v", values),
        )
        arguments = (
            self._paired(layer.index, heads),
            layer.rotation,
            self._head_norms(layer.weights, layer.index),
        )
        options = self._attention_options[layer.index]
        attended, pool = cached_attention(*arguments, pool, layer.batch, options)
        if layer.wants("attn.probs"):
            see = partial(layer.probe, "attn.probs")
            attended = explicit_attention(*arguments, pool, layer.batch, options, see)
        flat = attended.reshape(attended.shape[0], -1)
        return linear(flat, own["out"], own.get("out_bias")), pool

    def _project(self, own: Weights, normed: Array) -> Heads:
        """Queries [T, H, D], keys and values [T, K, D], not yet rotated."""
        config = self.config
        qkv = linear(normed, own["qkv"], own.get("qkv_bias"))  # [T, K, (G + 2) * D]
        tokens, kv_heads, _ = qkv.shape
        qkv = qkv.reshape(tokens, kv_heads, self.group + 2, config.head_dim)
        q = qkv[:, :, :-2].reshape(tokens, config.num_heads, config.head_dim)
        heads = Heads(q, qkv[:, :, -2], qkv[:, :, -1])
        norms = config.attention.head_norms
        if norms is None or norms.over == "head":
            return heads
        q, keys = (
            normalise_heads(x, norms.kind, own[name], together=norms.over == "all")
            for x, name in ((heads.q, "q_norm"), (heads.keys, "k_norm"))
        )
        return Heads(q, keys, heads.values)

    def _paired(self, layer: int, heads: Heads) -> Heads:
        """The features of each pair half a rotation apart, as it takes them."""
        rope = self.config.layers[layer].rope
        if rope is None or not self.config.attention.interleaved:
            return heads
        dim = rope.rotary_dim
        q, keys = pairs_apart(heads.q, dim), pairs_apart(heads.keys, dim)
        return Heads(q, keys, heads.values)

    def _head_norms(self, weights: Weights, layer: int) -> HeadNorms | None:
        norms = self.config.attention.head_norms
        if norms is None or norms.over != "head":
            return None
        q, keys = weights["qk_norms"][2 * layer], weights["qk_norms"][2 * layer + 1]
        return HeadNorms(q, keys, norms.kind.epsilon, norms.kind.weight_offset)

    def _mlp(self, own: Weights, normed: Array) -> Array:
        mlp = self.config.mlp
        apply = gated_mlp if mlp.gated else plain_mlp
        return apply(normed, own, mlp.activation)

    def _output(self, layer: Layer, norm: str | None, out: Array) -> Array:
        """What a half layer adds to the residual."""
        if norm is not None:
            out = self._norm(layer, norm, self._replicate(out))
        scale = self.config.block.residual_scale
        if scale != 1:
            out = (out.astype(jnp.float32) * scale).astype(out.dtype)
        return out

    def _norm(self, layer: Layer, name: str | None, hidden: Array) -> Array:
        if name is None:
            return hidden
        names = self.config.block.norms
        index = len(names) * layer.index + names.index(name)
        return self._normed(layer.weights, index, hidden)

    def _normed(self, weights: Weights, index: int, hidden: Array) -> Array:
        kind = self.config.norm
        bias = weights["norm_biases"][index] if kind.bias else None
        return normalise(hidden, kind, weights["norms"][index], bias)

    def _replicate(self, hidden: Array) -> Array:
        """Makes every device hold the sum: the one all-reduce of a half layer."""
        if self.options.mesh is None:
            return hidden
        everywhere = NamedSharding(self.options.mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(hidden, everywhere)

    @property
    def _has_mlp_input(self) -> bool:
        """Whether the MLP reads something else than the attention."""
        block = self.config.block
        return not block.parallel or block.before_mlp is not None

    @cached_property
    def _frequencies(self) -> dict[RopeConfig, tuple[np.ndarray, float]]:
        """Of each kind of rotation that a layer has."""
        ropes = dict.fromkeys(layer.rope for layer in self.config.layers)
        length = self.options.max_model_len
        return {rope: rope_frequencies(rope, length) for rope in ropes if rope}

    @cached_property
    def _attention_options(self) -> tuple[AttentionOptions, ...]:
        attention = self.config.attention
        scale = attention.scale
        common = AttentionOptions(
            scale=self.config.head_dim**-0.5 if scale is None else scale,
            implementation=self.options.attention,
            target=self.options.target,
            mesh=self.options.mesh,
            soft_cap=attention.soft_cap,
        )
        return tuple(
            dataclasses.replace(common, window=window) for window in self.windows
        )
