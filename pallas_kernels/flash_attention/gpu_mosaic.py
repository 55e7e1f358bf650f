"""Forward kernel for Hopper; the backward pass is that of Triton.

Two warpgroups compute 64 queries each and take turns at the tensor cores: one
multiplies while the other one is at its softmax. A third one copies tiles of keys and
values into a ring in shared memory.

Source: FlashAttention-3, arXiv:2407.08608 sections 3.1 and 3.2.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes
from pallas_kernels.flash_attention.gpu_triton import backward, check_supported
from pallas_kernels.flash_attention.gradient import attend
from pallas_kernels.flash_attention.rules import (
    LOG2_E,
    LOWEST,
    MASKED,
    NOTHING_SEEN,
    Arrays,
    Inputs,
    Rules,
    live_ranges,
    make_rules,
    make_tiles,
    tanh_by_exp2,
)

ROWS = 64
"""Queries of a warpgroup: the rows of one accumulator."""
NUM_COMPUTE = 2
TILE_Q = ROWS * NUM_COMPUTE
HEAD_DIMS = (64, 128, 256)
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40


def flash_attention_gpu_mosaic(
    q: Float[Array, "N T H D"],
    k: Float[Array, "N S K D"],
    v: Float[Array, "N S K D"],
    options: ScoreOptions,
    causal: bool,  # noqa: FBT001 (all implementations take it by place)
    q_segment_ids: Int[Array, "N T"] | None,
    kv_segment_ids: Int[Array, "N S"] | None,
    *,
    target: Target,
) -> Float[Array, "N T H D"]:
    """Attends with TMA and wgmma; see `api.flash_attention`."""
    arrays = Arrays(
        q, k, v, options.sinks, options.alibi_slopes, q_segment_ids, kv_segment_ids
    )
    check_supported(arrays)
    if target.generation.rstrip("a") != "sm_90":
        raise NotImplementedError(
            f"{target.generation or 'an unknown GPU'} is not sm_90 (Hopper)"
        )
    if q.dtype == jnp.float32:
        raise NotImplementedError("float32 on Mosaic GPU")
    if q.shape[-1] not in HEAD_DIMS:
        raise NotImplementedError(f"head width {q.shape[-1]} is not in {HEAD_DIMS}")
    return attend(
        functools.partial(_forward, target=target),
        functools.partial(backward, target=target),
        arrays,
        make_rules(arrays, options, causal=causal),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """All that is static.

    Attributes:
        rules: Who sees whom.
        tile_k: Keys of a tile.
        num_stages: Tiles in the ring.
        num_tiles: Tiles of queries.
        num_heads: Query heads `H`.
        group: Query heads per KV head.
        head_dim: Head width `D`.
        dtype: Type of queries, keys and values.
        per_sequence: Whether the live tiles differ from sequence to sequence.
        interpret: Whether the kernel runs in the simulator.
    """

    rules: Rules
    tile_k: int
    num_stages: int
    num_tiles: int
    num_heads: int
    group: int
    head_dim: int
    dtype: Any
    per_sequence: bool
    interpret: bool


class _Ring(NamedTuple):
    """What the warpgroups of a block share."""

    q: Any  # [NUM_COMPUTE, ROWS, D], later the output
    keys: Any  # [num_stages, tile_k, D]
    values: Any
    lse: Any  # [NUM_COMPUTE, ROWS]
    q_full: Any
    keys_full: Any
    values_full: Any
    keys_free: Any
    values_free: Any
    turn: Any


def _scratch(call: _Call) -> _Ring:
    tiles = (call.num_stages, call.tile_k, call.head_dim)
    full = plgpu.Barrier(num_barriers=call.num_stages)
    free = plgpu.Barrier(num_arrivals=NUM_COMPUTE, num_barriers=call.num_stages)
    return _Ring(
        q=plgpu.SMEM((NUM_COMPUTE, ROWS, call.head_dim), call.dtype),
        keys=plgpu.SMEM(tiles, call.dtype),
        values=plgpu.SMEM(tiles, call.dtype),
        lse=plgpu.SMEM((NUM_COMPUTE, ROWS), jnp.float32),
        q_full=plgpu.Barrier(num_barriers=NUM_COMPUTE),
        keys_full=full,
        values_full=full,
        keys_free=free,
        values_free=free,
        turn=plgpu.Barrier(num_arrivals=NUM_COMPUTE),
    )


def _pad(x: Array, tile: int) -> Array:
    missing = -x.shape[1] % tile
    if not missing:
        return x
    return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])


def _forward(arrays: Arrays, rules: Rules, *, target: Target) -> tuple[Array, Array]:
    n, _, num_heads, head_dim = arrays.q.shape
    default = {
        64: {"tile_k": 128, "num_stages": 4},
        128: {"tile_k": 128, "num_stages": 2},
        256: {"tile_k": 64, "num_stages": 2},
    }[head_dim]
    key = f"mosaic_forward_{arrays.q.dtype}_{head_dim}"
    sizes = tuned_sizes("flash_attention", target, key, default)
    ranges = live_ranges(make_tiles(rules, arrays, TILE_Q, sizes["tile_k"]))
    call = _Call(
        rules=rules,
        num_tiles=ranges.shape[1],
        num_heads=num_heads,
        group=num_heads // arrays.k.shape[2],
        head_dim=head_dim,
        dtype=arrays.q.dtype,
        per_sequence=ranges.shape[0] > 1,
        interpret=bool(target.interpret),
        **sizes,
    )
    planes = (
        _pad(arrays.q, TILE_Q),
        _pad(arrays.k, call.tile_k),
        _pad(arrays.v, call.tile_k),
    )
    inputs = Inputs.of(
        arrays,
        planes,
        lambda ids: _pad(ids, TILE_Q),
        lambda ids: _pad(ids, call.tile_k),
    )
    padded = inputs.q.shape[1]
    leaves, tree = jax.tree.flatten((ranges, inputs))

    def flash_attention_forward(*refs: Any) -> None:
        *given, out_ref, lse_ref = refs[: len(leaves) + 2]
        ring = _Ring(*refs[len(leaves) + 2 :])
        live, refs_of_inputs = jax.tree.unflatten(tree, given)
        _kernel(live, refs_of_inputs, (out_ref, lse_ref), ring, call)

    out, lse = plgpu.kernel(
        flash_attention_forward,
        out_type=(
            jax.ShapeDtypeStruct(inputs.q.shape, call.dtype),
            jax.ShapeDtypeStruct((n, num_heads, padded), jnp.float32),
        ),
        scratch_types=tuple(_scratch(call)),
        grid=(num_heads, call.num_tiles, n),
        grid_names=("head", "tile", "sequence"),
        num_threads=NUM_COMPUTE + 1,
        thread_name="warpgroup",
        # JAX versions differ in the default semantics.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=target.interpret or None,
    )(*leaves)
    return out[:, : rules.num_queries], lse[:, :, : rules.num_queries]


class _Work(NamedTuple):
    """Where a block stands, and the tiles of keys that it visits.

    Attributes:
        sequence: Number of the sequence.
        head: Query head.
        first_row: First query of the block.
        ranges: First live tile, first full one, end of the full ones, end.
    """

    sequence: Any
    head: Any
    first_row: Any
    ranges: tuple[Any, Any, Any, Any]

    @property
    def num_full(self) -> Any:
        """Full tiles; they come first."""
        return self.ranges[2] - self.ranges[1]

    @property
    def num_steps(self) -> Any:
        """All tiles."""
        return self.ranges[3] - self.ranges[0]

    def tile(self, step: Any) -> Any:
        """Tile of keys of a step."""
        first, full_first, full_end, _ = self.ranges
        partial = step - self.num_full
        leading = full_first - first
        after = jnp.where(
            partial < leading, first + partial, full_end + partial - leading
        )
        return jnp.where(partial < 0, full_first + step, after)


def _kernel(
    live: Any, inputs: Inputs, outputs: tuple[Any, Any], ring: _Ring, call: _Call
) -> None:
    sequence, index = lax.axis_index("sequence"), lax.axis_index("tile")
    # Causal tiles have the longest work first.
    tile = call.num_tiles - 1 - index if call.rules.causal else index
    table = live.at[sequence if call.per_sequence else 0, tile]
    ranges = (table[0], table[1], table[2], table[3])
    work = _Work(sequence, lax.axis_index("head"), tile * TILE_Q, ranges)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == NUM_COMPUTE)
    def _copy() -> None:
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        _copy_keys(inputs, ring, work, call)

    @pl.when(warpgroup < NUM_COMPUTE)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        _attend(inputs, outputs, ring, work, call)


def _copy_keys(inputs: Inputs, ring: _Ring, work: _Work, call: _Call) -> None:
    """Fills the ring with keys and values as its tiles become free."""
    kv_head = lax.div(work.head, jnp.int32(call.group))

    def fill(step: Array, _: None) -> None:
        stage = lax.rem(step, jnp.int32(call.num_stages))
        place = (
            work.sequence,
            pl.ds(work.tile(step) * call.tile_k, call.tile_k),
            kv_head,
        )
        for source, memory, full, free in (
            (inputs.k, ring.keys, ring.keys_full, ring.keys_free),
            (inputs.v, ring.values, ring.values_full, ring.values_free),
        ):

            @pl.when(step >= call.num_stages)
            def _wait(free: Any = free) -> None:
                plgpu.barrier_wait(free.at[stage])

            plgpu.copy_gmem_to_smem(source.at[place], memory.at[stage], full.at[stage])

    def drain(step: Array, _: None) -> None:
        stage = lax.rem(step, jnp.int32(call.num_stages))
        plgpu.barrier_wait(ring.keys_free.at[stage])
        plgpu.barrier_wait(ring.values_free.at[stage])

    lax.fori_loop(jnp.int32(0), work.num_steps, fill, None)
    # Leaves no phase of a barrier behind that nobody has waited for.
    unseen = jnp.maximum(work.num_steps - call.num_stages, 0)
    lax.fori_loop(unseen, work.num_steps, drain, None)


def _spread(values: Array, shape: tuple[int, ...], axis: int) -> Array:
    """A vector along one axis, repeated along the other one."""
    return lax.broadcast_in_dim(values, shape, (axis,))


def _attend(
    inputs: Inputs, outputs: tuple[Any, Any], ring: _Ring, work: _Work, call: _Call
) -> None:
    warpgroup = lax.axis_index("warpgroup")
    first_row = work.first_row + warpgroup * ROWS
    q = ring.q.at[warpgroup]
    rows = pl.ds(first_row, ROWS)
    plgpu.copy_gmem_to_smem(
        inputs.q.at[work.sequence, rows, work.head], q, ring.q_full.at[warpgroup]
    )
    plgpu.barrier_wait(ring.q_full.at[warpgroup])
    state = _empty(inputs, work, call)

    def step(number: Array, state: _State, *, partial: bool) -> _State:
        return _add_tile(number, state, inputs, ring, work, call, partial=partial)

    # The second warpgroup waits until the first one's first product is on its way.
    pl.when(warpgroup == 1)(lambda: _swap(ring))
    state = lax.fori_loop(
        jnp.int32(0), work.num_full, functools.partial(step, partial=False), state
    )
    state = lax.fori_loop(
        work.num_full, work.num_steps, functools.partial(step, partial=True), state
    )
    pl.when(warpgroup == 0)(lambda: _swap(ring))
    is_seen = state.total > 0.0
    total = jnp.where(is_seen, state.total, 1.0)
    lse = state.peak / LOG2_E + jnp.log(total)
    # The queries are no longer needed, and nobody else reads their memory.
    q[...] = (state.weighted * _spread(1.0 / total, state.weighted.shape, 0)).astype(
        call.dtype
    )
    ring.lse[warpgroup] = jnp.where(is_seen, lse, NOTHING_SEEN)
    plgpu.commit_smem()
    out_ref, lse_ref = outputs
    plgpu.copy_smem_to_gmem(q, out_ref.at[work.sequence, rows, work.head])
    plgpu.copy_smem_to_gmem(
        ring.lse.at[warpgroup], lse_ref.at[work.sequence, work.head, rows]
    )
    plgpu.wait_smem_to_gmem(0)


class _State(NamedTuple):
    """The running state of the online softmax."""

    weighted: Float[Array, "64 D"]
    peak: Float[Array, " 64"]
    total: Float[Array, " 64"]


def _empty(inputs: Inputs, work: _Work, call: _Call) -> _State:
    """The state before the first key: nothing, or the sink."""
    weighted = jnp.zeros((ROWS, call.head_dim), jnp.float32)
    if inputs.sinks is None:
        peak = jnp.full((ROWS,), LOWEST, jnp.float32)
        return _State(weighted, peak, jnp.zeros((ROWS,), jnp.float32))
    peak = jnp.full((ROWS,), inputs.sinks[work.head] * LOG2_E, jnp.float32)
    return _State(weighted, peak, jnp.ones((ROWS,), jnp.float32))


def _swap(ring: _Ring) -> None:
    """Gives the tensor cores to the other warpgroup and waits for them."""
    plgpu.barrier_arrive(ring.turn)
    plgpu.barrier_wait(ring.turn)


def _add_tile(
    number: Array,
    state: _State,
    inputs: Inputs,
    ring: _Ring,
    work: _Work,
    call: _Call,
    *,
    partial: bool,
) -> _State:
    """Adds one tile of keys to the state."""
    warpgroup = lax.axis_index("warpgroup")
    stage = lax.rem(number, jnp.int32(call.num_stages))
    plgpu.barrier_wait(ring.keys_full.at[stage])
    products = _multiply_keys(ring, ring.q.at[warpgroup], ring.keys.at[stage], call)
    plgpu.barrier_arrive(ring.keys_free.at[stage])
    place = (
        work.first_row + warpgroup * ROWS,
        work.tile(number) * call.tile_k,
    )
    scores = _scores(products, inputs, work, place, call, partial=partial)
    peak = jnp.maximum(state.peak, scores.max(axis=1))
    decay = jnp.exp2(state.peak - peak)
    weights = jnp.exp2(scores - _spread(peak, scores.shape, 0))
    total = state.total * decay + weights.sum(axis=1)
    weighted = state.weighted * _spread(decay, state.weighted.shape, 0)
    narrow = weights.astype(call.dtype)
    plgpu.barrier_arrive(ring.turn)
    plgpu.barrier_wait(ring.values_full.at[stage])
    plgpu.barrier_wait(ring.turn)
    weighted = _add_values(weighted, narrow, ring.values.at[stage], call)
    plgpu.barrier_arrive(ring.values_free.at[stage])
    return _State(weighted, peak, total)


def _multiply_keys(ring: _Ring, q: Any, keys: Any, call: _Call) -> Array:
    """Queries times keys, both in shared memory."""
    if call.interpret:  # the simulator's wgmma knows no transposed operand
        _swap(ring)
        products = q[...].astype(jnp.float32) @ keys[...].astype(jnp.float32).T
        plgpu.commit_smem()  # wgmma reads by the proxy that the copies write by
        return products

    def multiply(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, q, keys.transpose((1, 0)))
        _swap(ring)
        return accumulator[...]

    return pl.run_scoped(
        multiply, plgpu.WGMMAAccumulatorRef((ROWS, call.tile_k), jnp.float32)
    )


def _add_values(weighted: Array, weights: Array, values: Any, call: _Call) -> Array:
    """Adds weights, in registers, times values in shared memory."""
    if call.interpret:  # nor operands in registers
        products = weights.astype(jnp.float32) @ values[...].astype(jnp.float32)
        plgpu.commit_smem()
        return weighted + products

    def multiply(accumulator: Any) -> None:
        plgpu.wgmma(accumulator, weights, values)

    accumulated: Any = pl.run_state(multiply)
    return accumulated(plgpu.WGMMAAccumulatorRef.init(weighted))


def _ids(ref: Any, work: _Work, first: Any, count: int, call: _Call) -> Array:
    """Segment ids, from global memory straight into the layout of the scores."""
    place = work.sequence, pl.ds(first, count)
    # The simulator knows only the plain way to read.
    return ref[place] if call.interpret else plgpu.load(ref, place, optimized=False)


def _scores(
    products: Array,
    inputs: Inputs,
    work: _Work,
    place: tuple[Any, Any],
    call: _Call,
    *,
    partial: bool,
) -> Array:
    """Scores times log2(e) of a tile at (first row, first column)."""
    shape = products.shape
    bias, slope = None, None
    rows = lax.broadcasted_iota(jnp.int32, shape, 0) + place[0]
    columns = lax.broadcasted_iota(jnp.int32, shape, 1) + place[1]
    if inputs.slopes is not None:
        bias = call.rules.bias(rows, columns)
        slope = inputs.slopes[work.head]
    scores, _ = call.rules.scores(products, bias, slope, tanh_by_exp2)
    if not partial:
        return scores
    q_ids, kv_ids = None, None
    if inputs.q_segments is not None:
        q_ids = _ids(inputs.q_segments, work, place[0], shape[0], call)
        kv_ids = _ids(inputs.kv_segments, work, place[1], shape[1], call)
        q_ids, kv_ids = _spread(q_ids, shape, 0), _spread(kv_ids, shape, 1)
    visible = call.rules.visible(rows, columns, q_ids, kv_ids)
    return jnp.where(visible, scores, MASKED)
