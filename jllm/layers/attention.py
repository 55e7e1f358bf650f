"""Attention over the paged cache: write the new keys and values, then attend.

This is where `shard_map` wraps the kernels: they see the heads of one device only.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int, Shaped

from jllm.layers.batch import Batch
from pallas_kernels import copy_blocks, kv_write, paged_attention, ragged_attention
from pallas_kernels.common.attention import Implementation

HEADS = PartitionSpec(None, "tensor", None)
KV_HEADS = PartitionSpec(None, None, "tensor", None, None)
EVERYWHERE = PartitionSpec()


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What is fixed for all layers of a model.

    Attributes:
        scale: Factor on the scores.
        implementation: Kernel to use; a forced one never falls back.
        mesh: Devices that share the heads, None for a single one.
    """

    scale: float
    implementation: Implementation
    mesh: Mesh | None


def cached_attention(
    q: Float[Array, "T H D"],
    keys: Float[Array, "T K D"],
    values: Float[Array, "T K D"],
    kv: Shaped[Array, "B 2 K P W"],
    batch: Batch,
    options: AttentionOptions,
) -> tuple[Float[Array, "T H D"], Shaped[Array, "B 2 K P W"]]:
    """Writes the new keys and values, then attends to all cached tokens.

    The pool's heads may be wider than the model's: what is beyond stays zero.
    """
    local = partial(_write_and_attend, options=options)
    if options.mesh is not None:
        local = jax.shard_map(
            local,
            mesh=options.mesh,
            in_specs=(HEADS, HEADS, HEADS, KV_HEADS, EVERYWHERE),
            out_specs=(HEADS, KV_HEADS),
            check_vma=False,
        )
    return local(q, keys, values, kv, batch)


def _write_and_attend(
    q: Array,
    keys: Array,
    values: Array,
    kv: Array,
    batch: Batch,
    *,
    options: AttentionOptions,
) -> tuple[Array, Array]:
    head_dim, width = q.shape[-1], kv.shape[-1]
    q, keys, values = (_widen(x, width) for x in (q, keys, values))
    # Write first: from here on only the new pool is used, so that it is updated in
    # place, and the kernels find cached and new tokens in one place.
    kv = kv_write(kv, keys, values, batch.slots)
    tables, lengths = batch.block_tables, batch.lengths
    if batch.is_decode:
        out = paged_attention(
            q,
            kv,
            tables,
            lengths,
            scale=options.scale,
            implementation=options.implementation,
        )
    else:
        out = ragged_attention(
            q,
            kv,
            tables,
            batch.row_starts,
            lengths,
            scale=options.scale,
            implementation=options.implementation,
        )
    return out[:, :, :head_dim], kv


def _widen(x: Float[Array, "T N D"], width: int) -> Float[Array, "T N W"]:
    missing = width - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing))) if missing else x


def copy_cache_blocks(
    pools: tuple[Shaped[Array, "B ..."], ...],
    sources: Int[Array, " C"],
    targets: Int[Array, " C"],
) -> tuple[Shaped[Array, "B ..."], ...]:
    """Copies whole blocks in every pool; targets past the pool are dropped."""
    return tuple(copy_blocks(pool, sources, targets) for pool in pools)
