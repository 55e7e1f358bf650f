"""Attention over the paged cache: rotate, write keys and values, then attend.

This is where `shard_map` wraps the kernels: they see the heads of one device only.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Shaped

from jllm.layers.batch import Batch
from jllm.layers.kernels import Implementation, Target, TileLayout
from pallas_kernels import (
    copy_blocks,
    kv_write,
    paged_attention,
    paged_attention_update,
    qkv_write,
    ragged_attention,
)
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.kv_write import HeadNorms, Heads, Rotation, rotate_and_widen
from pallas_kernels.paged_attention import NewTokens
from pallas_kernels.ragged_attention import (
    TokenRuns,
    attend_by_weights,
    ragged_attention_weights,
)
from pallas_kernels.ragged_attention import tile_layout as ragged_tile_layout

HEADS = PartitionSpec(None, "tensor", None)
KV_HEADS = PartitionSpec(None, None, "tensor", None, None)
EVERYWHERE = PartitionSpec()


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How a layer attends.

    Attributes:
        scale: Factor on the scores.
        implementation: Kernel to use; a forced one never falls back.
        target: Device that the kernels are made for, None for the default one.
        mesh: Devices that share the heads, None for a single one.
        window: Newest positions that a query sees, itself included; None for all.
        soft_cap: Bound of the scores; None for none.
    """

    scale: float
    implementation: Implementation
    target: Target | None
    mesh: Mesh | AbstractMesh | None
    window: int | None = None
    soft_cap: float | None = None

    @property
    def write_implementation(self) -> Implementation:
        """Kernel that writes: XLA's scatter where attention is XLA's by force."""
        is_xla = self.implementation in ("reference", "blocked")
        return "reference" if is_xla else "auto"

    @property
    def stores_while_attending(self) -> bool:
        """Whether a decode step's keys and values are stored by attention itself.

        A TPU's kernel has their blocks in its vector memory anyway.
        """
        is_tpu = self.target is not None and self.target.platform == "tpu"
        return is_tpu and self.implementation in ("auto", "tpu")


def cached_attention(
    heads: Heads,
    rotation: Rotation | None,
    norms: HeadNorms | None,
    kv: Shaped[Array, "B 2 K P W"],
    batch: Batch,
    options: AttentionOptions,
) -> tuple[Float[Array, "T H D"], Shaped[Array, "B 2 K P W"]]:
    """Normalises and rotates the heads, writes keys and values, then attends.

    The pool's heads may be wider than the model's: what is beyond stays zero. Heads
    without a rotation are written by themselves, since the fused kernel rotates.

    Args:
        heads: Queries, keys and values of the new tokens.
        rotation: Angles of each token; None where they are not rotated.
        norms: Norms of queries and keys, None for none.
        kv: The layer's pool.
        batch: The step's tokens.
        options: How to attend.
    """
    local = partial(_write_and_attend, options=options)
    if options.mesh is not None:
        local = jax.shard_map(
            local,
            mesh=options.mesh,
            in_specs=(HEADS, EVERYWHERE, EVERYWHERE, KV_HEADS, EVERYWHERE),
            out_specs=(HEADS, KV_HEADS),
            check_vma=False,
        )
    return local(heads, rotation, norms, kv, batch)


def explicit_attention(
    heads: Heads,
    rotation: Rotation | None,
    norms: HeadNorms | None,
    kv: Shaped[Array, "B 2 K P W"],
    batch: Batch,
    options: AttentionOptions,
    change: Callable[[Array], Array],
) -> Float[Array, "T H D"]:
    """Attention with its weights in memory, where they can be seen and changed.

    Args:
        heads: Queries, keys and values of the new tokens.
        rotation: Angles of each token; None where they are not rotated.
        norms: Norms of queries and keys, None for none.
        kv: The layer's pool, the new tokens already written.
        batch: The step's tokens.
        options: How to attend.
        change: From the weights f32[T, H, C] to those that are used; `C` counts the
            positions that a block table holds.
    """
    scores = ScoreOptions(options.scale, options.window, options.soft_cap)
    q, _, _ = _prepared(heads, rotation, norms, kv.shape[-1])
    runs = (batch.block_tables, batch.row_starts, batch.lengths)
    weights = change(ragged_attention_weights(q, kv, *runs, scores))
    out = attend_by_weights(weights, kv, *runs, q.dtype)
    return out[:, :, : heads.q.shape[-1]]


def tile_layout(
    num_heads: int,
    dtype: DTypeLike,
    kv: jax.ShapeDtypeStruct,
    options: AttentionOptions,
) -> TileLayout | None:
    """How prefill attention wants a step's tokens cut; None where it does not care.

    Args:
        num_heads: Query heads of all devices.
        dtype: Type of the queries.
        kv: Shape `[B, 2, K, P, W]` and type of the pool of all devices.
        options: As `cached_attention` is called.
    """
    num_devices = 1 if options.mesh is None else options.mesh.shape["tensor"]
    heads, width = kv.shape[2] // num_devices, kv.shape[4]
    pool = jax.ShapeDtypeStruct((*kv.shape[:2], heads, *kv.shape[3:]), kv.dtype)
    return ragged_tile_layout(
        jax.ShapeDtypeStruct((1, num_heads // num_devices, width), dtype),
        pool,
        implementation=options.implementation,
        target=options.target,
    )


def _write_and_attend(
    heads: Heads,
    rotation: Rotation | None,
    norms: HeadNorms | None,
    kv: Array,
    batch: Batch,
    *,
    options: AttentionOptions,
) -> tuple[Array, Array]:
    scores = ScoreOptions(options.scale, options.window, options.soft_cap)
    head_dim = heads.q.shape[-1]
    tables, lengths = batch.block_tables, batch.lengths
    if batch.is_decode and options.stores_while_attending:
        tokens = NewTokens(*_prepared(heads, rotation, norms, kv.shape[-1]))
        out, kv = paged_attention_update(
            tokens,
            kv,
            tables,
            lengths,
            scores,
            implementation=options.implementation,
            target=options.target,
        )
        return out[:, :, :head_dim], kv
    # Write first: from here on only the new pool is used, so that it is updated in
    # place, and the kernels find cached and new tokens in one place.
    q, kv = _write(heads, rotation, norms, kv, batch, options)
    if batch.is_decode:
        out = paged_attention(
            q,
            kv,
            tables,
            lengths,
            scores,
            implementation=options.implementation,
            target=options.target,
        )
    else:
        out = ragged_attention(
            q,
            kv,
            tables,
            TokenRuns(batch.row_starts, lengths, batch.tiles),
            scores,
            implementation=options.implementation,
            target=options.target,
        )
    return out[:, :, :head_dim], kv


def _write(
    heads: Heads,
    rotation: Rotation | None,
    norms: HeadNorms | None,
    kv: Array,
    batch: Batch,
    options: AttentionOptions,
) -> tuple[Array, Array]:
    """The queries ready for attention, and the pool with the new keys and values."""
    implementation, target = options.write_implementation, options.target
    if rotation is None:
        q, keys, values = _prepared(heads, None, norms, kv.shape[-1])
        kv = kv_write(
            kv, keys, values, batch.slots, implementation=implementation, target=target
        )
        return q, kv
    return qkv_write(
        heads,
        kv,
        batch.slots,
        rotation,
        norms=norms,
        implementation=implementation,
        target=target,
    )


def _prepared(
    heads: Heads, rotation: Rotation | None, norms: HeadNorms | None, width: int
) -> Heads:
    """The heads as attention takes them, by XLA."""
    if rotation is None:
        nothing = jnp.zeros((heads.q.shape[0], 0), jnp.float32)
        rotation = Rotation(nothing, nothing)
    return rotate_and_widen(heads, rotation, norms, width)


def copy_cache_blocks(
    pools: tuple[Shaped[Array, "B ..."], ...],
    sources: Int[Array, " C"],
    targets: Int[Array, " C"],
) -> tuple[Shaped[Array, "B ..."], ...]:
    """Copies whole blocks in every pool; targets past the pool are dropped."""
    # By XLA, which divides gather and scatter among the devices as the pools are.
    return tuple(
        copy_blocks(pool, sources, targets, implementation="reference")
        for pool in pools
    )
