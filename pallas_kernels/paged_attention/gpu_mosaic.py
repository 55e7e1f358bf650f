"""Decode attention for Hopper: split keys, TMA per block, wgmma, then a combination.

The rows' keys are cut into items of about the same size by the rows' real lengths, so
that one long row among short ones fills the device too. Two warpgroups of a thread
block take the tiles of its item in turn. Queries are the rows of the products although
few of the 64 are used: the tensor cores have time, it is the keys and values that have
to be waited for.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.mosaic_attention import (
    COMPUTE_REGISTERS,
    COPY_REGISTERS,
    HEAD_DIMS,
    LOG2_E,
    MASKED,
    NUM_COMPUTE,
    ROWS,
    MosaicTiles,
    Queries,
    Ring,
    Run,
    Softmax,
    Turns,
    as_columns,
    as_units,
    attend,
    check_supported,
    compiler_params,
    copy_keys,
    divide_up,
    normalised,
    values_per_row,
)
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes

FOLDER = "paged_attention"
ROW_STEP = 8
"""Rows are moved in steps of this many, those of a tile of shared memory."""

VALUES_AT_ONCE = 1024
"""Items whose results the combination reads at once, times the head width."""


def default_sizes(head_dim: int) -> dict[str, int]:
    """Sizes that fill the shared memory of an SM.

    The ring has as many tiles as are 128 KiB. Items are no shorter than `min_keys`,
    and there are about `items_per_core` of them for each multiprocessor.
    """
    return {
        "block_n": 64,
        "num_stages": 512 // head_dim,
        "min_keys": 512,
        "items_per_core": 2,
    }


def paged_attention_gpu_mosaic(
    q: Float[Array, "S Q H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    kv_scales: Float[Array, "2 K"] | None,
    *,
    target: Target,
) -> Float[Array, "S Q H D"]:
    """Attends each sequence's newest tokens; see `api.paged_attention`."""
    check_supported(q, kv, kv_scales, options, target)
    num_rows, num_new, num_heads, head_dim = q.shape
    num_kv_heads = kv.shape[2]
    used_rows = num_new * (num_heads // num_kv_heads)
    if used_rows > ROWS:
        raise NotImplementedError(
            f"{used_rows} queries per KV head and sequence, above {ROWS}"
        )
    if head_dim == max(HEAD_DIMS) and options.alibi_slopes is not None:
        raise NotImplementedError(
            f"ALiBi at head width {head_dim} on Mosaic GPU, whose shared memory is full"
        )
    if 0 in q.shape or 0 in block_tables.shape:
        return jnp.zeros_like(q)
    key = f"mosaic_{q.dtype}_{head_dim}"
    sizes = tuned_sizes(FOLDER, target, key, default_sizes(head_dim))
    if sizes["num_stages"] % NUM_COMPUTE:
        # A warpgroup must see every use of a stage, or it loses count of them.
        raise ValueError(
            f"num_stages={sizes['num_stages']} must be a multiple of {NUM_COMPUTE}"
        )
    tiles = MosaicTiles.of(q, kv, options, sizes, tokens=num_new, target=target)
    num_items = max(1, sizes["items_per_core"] * target.num_cores // num_kv_heads)
    plan = split_keys(lengths, num_items, sizes["min_keys"], tiles)
    grouped = q.reshape(num_rows, num_new, num_kv_heads, tiles.group, head_dim)
    packed = grouped.transpose(0, 2, 1, 3, 4)
    packed = packed.reshape(num_rows, num_kv_heads, used_rows, head_dim)
    missing = -used_rows % ROW_STEP
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, missing), (0, 0)))
    slopes, sinks = options.alibi_slopes, options.sinks
    if slopes is not None:
        slopes = values_per_row(slopes, num_kv_heads, ROWS)
    if sinks is not None:
        sinks = values_per_row(sinks, num_kv_heads, packed.shape[2])
    tables = block_tables.astype(jnp.int32)
    means, sums = attend_items(
        packed, as_units(kv, tiles), tables, plan.items, slopes, tiles, target
    )
    out = combine_items(means, sums, plan.rows, sinks, tiles, target)
    out = out.reshape(packed.shape)[:, :, :used_rows]
    out = out.reshape(num_rows, num_kv_heads, num_new, tiles.group, head_dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(q.shape)


class Plan(NamedTuple):
    """How the rows' keys are split.

    Attributes:
        items: Row, first key, end and length of each item; those not used are empty.
        rows: First item of each row, and how many it has.
    """

    items: Int[Array, "N 4"]
    rows: Int[Array, "S 2"]


def split_keys(
    lengths: Int[Array, " S"], num_items: int, min_keys: int, tiles: MosaicTiles
) -> Plan:
    """Cuts the keys of all rows into items of whole tiles.

    At most `num_items` and one more per row are used. All items of a row have the same
    size. It depends on the lengths alone, so that it is computed once for all layers.
    """
    lengths = lengths.astype(jnp.int32)
    begins = jnp.zeros_like(lengths)
    if tiles.window is not None:
        oldest = jnp.maximum(lengths - tiles.tokens - (tiles.window - 1), 0)
        begins = oldest // tiles.unit * tiles.unit
    keys = lengths - begins
    target_size = jnp.maximum(divide_up(keys.sum(), num_items), min_keys)
    counts = -(-keys // target_size)
    sizes = -(-keys // jnp.maximum(counts, 1))
    sizes = jnp.maximum(divide_up(sizes, tiles.block_n), 1) * tiles.block_n
    counts = -(-keys // sizes)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    firsts = ends - counts
    items = jnp.arange(num_items + lengths.shape[0], dtype=jnp.int32)
    rows = jnp.sum(items[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    is_used = rows < lengths.shape[0]
    rows = jnp.minimum(rows, lengths.shape[0] - 1)
    begin = begins[rows] + (items - firsts[rows]) * sizes[rows]
    end = jnp.minimum(begin + sizes[rows], lengths[rows])
    end = jnp.where(is_used, end, begin)
    return Plan(
        jnp.stack([rows, begin, end, lengths[rows]], axis=1),
        jnp.stack([firsts, counts], axis=1),
    )


class Scratch(NamedTuple):
    """Shared memory and barriers of a thread block."""

    ring: Ring
    queries: Any  # [64, D]
    slopes: Any  # [64], or None
    means: Any  # [64, D], float32
    sums: Any  # [64]
    queries_full: Any
    merge: Any

    @classmethod
    def types(cls, tiles: MosaicTiles, *, has_slopes: bool) -> "Scratch":
        """What to allocate."""
        vector = plgpu.SMEM((ROWS,), jnp.float32)
        return cls(
            Ring.scratch(tiles, readers=1),
            plgpu.SMEM((ROWS, tiles.head_dim), tiles.dtype),
            vector if has_slopes else None,
            plgpu.SMEM((ROWS, tiles.head_dim), jnp.float32),
            vector,
            plgpu.Barrier(num_arrivals=2 if has_slopes else 1),
            plgpu.Barrier(num_arrivals=1),
        )


def attend_items(
    q: Float[Array, "S K R D"],
    kv: Shaped[Array, "U W D"],
    block_tables: Int[Array, "S M"],
    items: Int[Array, "N 4"],
    slopes: Float[Array, "K 64"] | None,
    tiles: MosaicTiles,
    target: Target,
) -> tuple[Float[Array, "N K R D"], Float[Array, "N K R D"]]:
    """Means of the values of each item, and sums of the weights as logarithms.

    The sums are repeated along D, so that the combination is element by element. Items
    that are not used are left undefined.
    """
    num_items, used_rows = items.shape[0], q.shape[2]
    has_slopes = slopes is not None

    def paged_attention(*refs: Any) -> None:
        q, kv, tables, items, *given, means, sums, scratch = refs
        item, head = lax.axis_index("item"), lax.axis_index("head")
        warpgroup = lax.axis_index("warpgroup")
        run = Run(items[item, 0], head, items[item, 1], items[item, 2], items[item, 3])

        @pl.when((run.end > run.begin) & (warpgroup == NUM_COMPUTE))
        def _copy() -> None:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            rows = scratch.queries.at[pl.ds(0, used_rows)]
            plgpu.copy_gmem_to_smem(q.at[run.row, head], rows, scratch.queries_full)
            if given:
                plgpu.copy_gmem_to_smem(
                    given[0].at[head], scratch.slopes, scratch.queries_full
                )
            copy_keys(kv, tables, run, scratch.ring, tiles)

        @pl.when((run.end > run.begin) & (warpgroup < NUM_COMPUTE))
        def _compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            plgpu.barrier_wait(scratch.queries_full)
            queries = Queries(
                scratch.queries,
                0,
                run.length - tiles.tokens,
                scratch.slopes[...] if has_slopes else None,
            )
            turns = Turns(
                first=warpgroup,
                step=NUM_COMPUTE,
                swap=_nothing,
                clears=True,
                cleared=_nothing,
            )
            state = attend(queries, run, scratch.ring, turns, tiles)
            outputs = (means.at[item, head], sums.at[item, head])
            _finish(state, warpgroup, scratch, outputs, used_rows)

    shape = (num_items, tiles.num_kv_heads, used_rows, tiles.head_dim)
    described = jax.ShapeDtypeStruct(shape, jnp.float32)
    kernel = plgpu.kernel(
        paged_attention,
        out_type=[described, described],
        scratch_types=[Scratch.types(tiles, has_slopes=has_slopes)],
        compiler_params=compiler_params(),
        grid=(num_items, tiles.num_kv_heads),
        grid_names=("item", "head"),
        num_threads=NUM_COMPUTE + 1,
        thread_name="warpgroup",
        interpret=target.interpret or None,
    )
    given = [slopes] if slopes is not None else []
    means, sums = kernel(q, kv, block_tables, items, *given)
    return means, sums


def _nothing() -> None:
    """Warpgroups with tiles of their own have nothing to wait for."""


def _finish(
    state: Softmax,
    warpgroup: Array,
    scratch: Scratch,
    outputs: tuple[Any, Any],
    used_rows: int,
) -> None:
    """Merges the two warpgroups' states and writes the item's results."""
    means, sums = normalised(state)
    width = means.shape[1]

    @pl.when(warpgroup == 1)
    def _hand_over() -> None:
        scratch.means[...] = means
        scratch.sums[...] = sums
        plgpu.barrier_arrive(scratch.merge)

    @pl.when(warpgroup == 0)
    def _merge() -> None:
        plgpu.barrier_wait(scratch.merge)
        others = scratch.sums[...]
        maximum = jnp.maximum(sums, others)
        weight, other_weight = jnp.exp2(sums - maximum), jnp.exp2(others - maximum)
        total = weight + other_weight
        merged = means * as_columns(weight / total, width)
        merged += scratch.means[...] * as_columns(other_weight / total, width)
        all_sums = as_columns(maximum + jnp.log(total) * LOG2_E, width)
        rows = scratch.means.at[pl.ds(0, used_rows)]
        for values, output in zip((merged, all_sums), outputs, strict=True):
            scratch.means[...] = values
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(rows, output)
            plgpu.wait_smem_to_gmem(0)


def combine_items(
    means: Float[Array, "N K R D"],
    sums: Float[Array, "N K R D"],
    rows: Int[Array, "S 2"],
    sinks: Float[Array, "K R"] | None,
    tiles: MosaicTiles,
    target: Target,
) -> Float[Array, "S K C 8 D"]:
    """Weighs the means of each row's items by their sums of weights.

    A sink is one more item, without values.
    """
    num_kv_heads, num_rows, head_dim = means.shape[1:]
    shape = (num_kv_heads, num_rows // ROW_STEP, ROW_STEP, head_dim)
    means, sums = (array.reshape(-1, *shape) for array in (means, sums))
    given: list[Array] = []
    if sinks is not None:
        given = [
            jnp.broadcast_to(sinks[:, :, None], (*sinks.shape, head_dim)).reshape(shape)
        ]

    items_at_once = VALUES_AT_ONCE // head_dim

    def paged_attention_combine(means: Any, sums: Any, rows: Any, *refs: Any) -> None:
        *given, out = refs
        row, head = lax.axis_index("row"), lax.axis_index("head")
        part = lax.axis_index("part")
        first, count = rows[row, 0], rows[row, 1]
        last = jnp.maximum(first + count - 1, 0)

        def add_items(group: Array, state: Any) -> Any:
            numbers = [first + group * items_at_once + i for i in range(items_at_once)]
            places = [jnp.minimum(number, last) for number in numbers]
            loaded = [(means[p, head, part], sums[p, head, part]) for p in places]
            for number, (mean, total) in zip(numbers, loaded, strict=True):
                missing = jnp.where(number <= last, 0.0, MASKED)
                state = _add_item(state, mean, jnp.maximum(total + missing, MASKED))
            return state

        tile = (ROW_STEP, head_dim)
        if given:
            maximum = given[0][head, part] * LOG2_E
            total = jnp.ones(tile, jnp.float32)
        else:
            maximum = jnp.full(tile, MASKED, jnp.float32)
            total = jnp.zeros(tile, jnp.float32)
        state = (jnp.zeros(tile, jnp.float32), maximum, total)
        groups = divide_up(count, items_at_once)
        weighted, _, total = lax.fori_loop(jnp.int32(0), groups, add_items, state)
        normal = weighted / jnp.where(total > 0, total, 1.0)
        out[row, head, part] = normal.astype(tiles.dtype)

    kernel = plgpu.kernel(
        paged_attention_combine,
        out_type=jax.ShapeDtypeStruct((rows.shape[0], *shape), tiles.dtype),
        compiler_params=compiler_params(),
        grid=(rows.shape[0], *shape[:2]),
        grid_names=("row", "head", "part"),
        interpret=target.interpret or None,
    )
    return kernel(means, sums, rows, *given)


def _add_item(
    state: tuple[Array, Array, Array], mean: Array, sum_of_weights: Array
) -> tuple[Array, Array, Array]:
    """Adds an item to the weighted means, the maximum and the sum of all."""
    weighted, maximum, total = state
    new_maximum = jnp.maximum(maximum, sum_of_weights)
    decay = jnp.exp2(maximum - new_maximum)
    weight = jnp.exp2(sum_of_weights - new_maximum)
    return weighted * decay + mean * weight, new_maximum, total * decay + weight
