"""The steps of a pipeline: one microbatch goes in, another comes out.

Each step is one tick of all stages. A microbatch goes into the first stage with its
packed vector; its rows advance and its tokens are laid out then, and it carries that
along. It comes out of the last stage `N - 1` ticks later; then its tokens are drawn and
recorded. In between its rows are in no other microbatch, but for the chunks of a
prompt, which may follow each other at once.

Every stage meets the microbatches in the order in which they went in, so that blocks
are written and copied in that order everywhere. A row that starts anew takes the older
microbatches that it is still in out of its way.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding
from jaxtyping import Float, Int, Shaped

from jllm.engine.batches import (
    Turn,
    drop_unless,
    enter_decode,
    enter_prefill,
    record_tokens,
)
from jllm.engine.inputs import DecodeInput, InputLayout, PrefillInput, split_vector
from jllm.engine.scoring import draw_tokens, score, score_sampling_rows
from jllm.engine.state import EngineState, Leaf, RowField
from jllm.engine.steps import StepResult, record_drawn
from jllm.models.base import Batch, CacheGroup, Weights
from jllm.models.pipeline import OF_STAGE, Microbatch, PipelinedDecoder
from jllm.sampling.draws import DrawMethod


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flights:
    """The microbatches on their way, stacked; part of the device state.

    That of tick `t` lies at place `t % N` of all arrays but `hidden`, until the one of
    tick `t + N` takes its place.

    Attributes:
        tick: Number of the last tick.
        hidden: What each stage takes in the next tick; on the devices of that stage.
        microbatches: Their tokens and block copies.
        row_ids: Row of the table of each of their rows; past the table for padding.
        samples: Which of the rows sample.
        num_samples: How many rows were planned to sample; they come first.
    """

    tick: Leaf  # i32[]
    hidden: Leaf  # [N, T, E]
    microbatches: Microbatch
    row_ids: Leaf  # i32[N, S]
    samples: Leaf  # bool[N, S]
    num_samples: Leaf  # i32[N]


def describe_flights(
    model: PipelinedDecoder,
    layout: InputLayout,
    max_blocks: int,
    place: NamedSharding,
) -> Flights:
    """Shapes, types and shardings.

    Args:
        model: The network.
        layout: Sizes of the largest prefill program.
        max_blocks: Blocks per row at most.
        place: Where small arrays live.
    """
    stages, rows, tokens = model.num_stages, layout.num_rows, layout.num_tokens

    def array(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((stages, *shape), jnp.dtype(dtype), sharding=place)

    groups = 1 + len(layout.window_pool_blocks)
    copies = array(layout.max_copies)
    microbatches = Microbatch(
        tokens=array(tokens),
        positions=array(tokens),
        row_starts=array(rows + 1),
        lengths=array(rows),
        slots=(array(tokens),) * groups,
        block_tables=(array(rows, max_blocks),) * groups,
        copies=((copies, copies),) * groups,
    )
    return Flights(
        tick=jax.ShapeDtypeStruct((), jnp.int32, sharding=place),
        hidden=jax.ShapeDtypeStruct(
            (stages, tokens, model.width),
            model.options.dtype,
            sharding=NamedSharding(place.mesh, OF_STAGE),
        ),
        microbatches=microbatches,
        row_ids=array(rows),
        samples=array(rows, dtype="bool"),
        num_samples=array(),
    )


def decode_tick(
    model: PipelinedDecoder,
    layout: InputLayout,
    method: DrawMethod,
    weights: Weights,
    state: EngineState,
    vector: Int[Array, " I"],
) -> tuple[EngineState, StepResult]:
    """Takes one token of each row in, where every stage has nothing else.

    Donates: state.
    """
    inputs = DecodeInput(**split_vector(layout, vector))
    state, turn, batch = enter_decode(_groups(model), layout, state, inputs)
    count = jnp.sum(inputs.rows < layout.table_rows)
    in_table = jnp.arange(layout.num_rows) < count
    # Right for a prefill program too, where a row has no more tokens than its length.
    ragged = dataclasses.replace(
        batch,
        row_starts=jnp.minimum(batch.row_starts, count.astype(jnp.int32)),
        lengths=jnp.where(in_table, jnp.maximum(batch.lengths, 1), 0),
    )
    nothing = jnp.zeros(layout.max_copies, jnp.int32)
    copies = tuple(
        (nothing, _past(size, 0, layout.max_copies))
        for size in (layout.num_pool_blocks, *layout.window_pool_blocks)
    )
    state = _board(layout, state, turn, Microbatch.of(ragged, copies), count)
    state, leaving, hidden = _advance(model, layout, weights, state, batch)
    sampling = leaving.sampling()
    scores = score(model, method, weights, layout.num_rows, hidden, sampling)
    drawn = draw_tokens(scores, method, sampling)
    return record_drawn(state, leaving, drawn, hidden)


def prefill_tick(
    model: PipelinedDecoder,
    layout: InputLayout,
    method: DrawMethod,
    weights: Weights,
    state: EngineState,
    vector: Int[Array, " I"],
) -> tuple[EngineState, StepResult]:
    """Takes prompt chunks and single tokens in; the stages may have any mix.

    Donates: state.
    """
    inputs = PrefillInput(**split_vector(layout, vector))
    pools = state.kv
    # The pools are copied in by each stage, in its own time.
    state, turn, batch = enter_prefill(
        _groups(model), layout, dataclasses.replace(state, kv=()), inputs
    )
    state = _leave_out(dataclasses.replace(state, kv=pools), inputs)
    copies = [(inputs.copy_sources, inputs.copy_targets)]
    if inputs.window_sources is not None and inputs.window_targets is not None:
        copies += zip(inputs.window_sources, inputs.window_targets, strict=True)
    microbatch = Microbatch.of(batch, tuple(copies))
    state = _board(layout, state, turn, microbatch, jnp.sum(inputs.samples))
    state, leaving, hidden = _advance(model, layout, weights, state, batch)
    place = _oldest(state.flights)
    starts = _at(state.flights.microbatches.row_starts, place)
    scores = score_sampling_rows(
        partial(score, model, method, weights),
        layout.scored_rows,
        hidden.at[starts[1:] - 1].get(mode="clip"),
        leaving.sampling(),
        _at(state.flights.num_samples, place),
    )
    drawn = draw_tokens(scores, method, leaving.sampling())
    return record_drawn(state, leaving, drawn, hidden)


def _groups(model: PipelinedDecoder) -> tuple[CacheGroup, ...]:
    """The cache groups without their layers, which lie in the stages."""
    return tuple(CacheGroup((), group.window) for group in model.cache_groups)


def _leave_out(state: EngineState, inputs: PrefillInput) -> EngineState:
    """Rows that start sample nothing in the microbatches that went in before."""
    flights: Flights = state.flights
    starting = drop_unless(inputs.starts == 1, inputs.rows, state)
    is_gone = jnp.any(flights.row_ids[:, :, None] == starting[None, None, :], axis=2)
    flights = dataclasses.replace(flights, samples=flights.samples & ~is_gone)
    return dataclasses.replace(state, flights=flights)


def _board(
    layout: InputLayout,
    state: EngineState,
    turn: Turn,
    microbatch: Microbatch,
    num_samples: Int[Array, ""],
) -> EngineState:
    """Begins a tick: a microbatch goes in, and its rows advance."""
    flights: Flights = state.flights
    num_stages, num_tokens, _ = flights.hidden.shape
    tick = flights.tick + 1
    place = tick % num_stages
    rows = turn.rows.fields.at[:, RowField.POSITION].set(turn.positions())
    state = dataclasses.replace(
        record_tokens(state, microbatch.batch()),
        rows=state.rows.put(turn.row_ids, rows),
    )
    padding = _past(layout.table_rows, layout.num_rows, layout.table_rows)
    entries = {
        "microbatches": _widened(layout, state, microbatch, num_tokens),
        "row_ids": jnp.concatenate([turn.row_ids, padding]),
        "samples": _filled(turn.samples, layout.table_rows),
        "num_samples": num_samples.astype(jnp.int32),
    }
    stacked = {name: getattr(flights, name) for name in entries}
    stacked = jax.tree.map(
        lambda all_of, x: jax.lax.dynamic_update_index_in_dim(all_of, x, place, 0),
        stacked,
        entries,
    )
    flights = dataclasses.replace(flights, tick=tick, **stacked)
    return dataclasses.replace(state, flights=flights)


def _widened(
    layout: InputLayout, state: EngineState, microbatch: Microbatch, num_tokens: int
) -> Microbatch:
    """Padded up to the largest sizes, as a prefill program has it."""
    block_size, rows = state.block_tokens.shape[1], layout.table_rows
    sizes = (layout.num_pool_blocks, *layout.window_pool_blocks)

    def slots(x: Array, num_blocks: int) -> Array:
        past = _past(num_blocks * block_size, x.shape[0], num_tokens)
        return jnp.concatenate([x, past])

    return Microbatch(
        tokens=_filled(microbatch.tokens, num_tokens),
        positions=_filled(microbatch.positions, num_tokens),
        row_starts=_filled(microbatch.row_starts, rows + 1, mode="edge"),
        lengths=_filled(microbatch.lengths, rows),
        slots=tuple(map(slots, microbatch.slots, sizes)),
        block_tables=tuple(_filled(table, rows) for table in microbatch.block_tables),
        copies=microbatch.copies,
    )


def _advance(
    model: PipelinedDecoder,
    layout: InputLayout,
    weights: Weights,
    state: EngineState,
    entering: Batch,
) -> tuple[EngineState, Turn, Float[Array, "T E"]]:
    """Runs the stages; returns the rows that come out, and their hidden states."""
    flights: Flights = state.flights
    num_tokens = layout.num_tokens
    places = (flights.tick - jnp.arange(model.num_stages)) % model.num_stages
    final, passed, kv = model.advance(
        weights,
        state.kv,
        model.whole.embedded(weights, entering),
        flights.hidden[:, :num_tokens],
        _narrowed(flights.microbatches, layout),
        places,
    )
    hidden = jax.lax.dynamic_update_slice_in_dim(flights.hidden, passed, 0, axis=1)
    flights = dataclasses.replace(flights, hidden=hidden)
    place = _oldest(flights)
    row_ids = _at(flights.row_ids, place)[: layout.num_rows]
    samples = _at(flights.samples, place)[: layout.num_rows]
    # They have advanced already.
    turn = Turn(row_ids, state.rows.take(row_ids), jnp.zeros_like(row_ids), samples)
    return dataclasses.replace(state, kv=kv, flights=flights), turn, final


def _narrowed(microbatches: Microbatch, layout: InputLayout) -> Microbatch:
    """All microbatches, cut to the sizes of a program that holds each of them."""
    rows, tokens = layout.num_rows, layout.num_tokens
    is_decode = layout.kind == "decode"
    return Microbatch(
        tokens=microbatches.tokens[:, :tokens],
        positions=microbatches.positions[:, :tokens],
        row_starts=microbatches.row_starts[:, : rows + 1],
        lengths=microbatches.lengths[:, :rows],
        slots=tuple(slots[:, :tokens] for slots in microbatches.slots),
        block_tables=tuple(table[:, :rows] for table in microbatches.block_tables),
        # Blocks are copied for rows that start, which only prefill programs take in.
        copies=() if is_decode else microbatches.copies,
        is_decode=is_decode,
    )


def _oldest(flights: Flights) -> Int[Array, ""]:
    """Place of the microbatch that is in the last stage."""
    return (flights.tick + 1) % flights.num_samples.shape[0]


def _at(x: Shaped[Array, "N ..."], place: Int[Array, ""]) -> Shaped[Array, "..."]:
    return jax.lax.dynamic_index_in_dim(x, place, keepdims=False)


def _past(end: int, start: int, stop: int) -> Int[Array, " P"]:
    """Distinct numbers from an end on, for the places from `start` to `stop`."""
    return end + jnp.arange(start, stop, dtype=jnp.int32)


def _filled(
    x: Shaped[Array, "N ..."], size: int, mode: str = "constant"
) -> Shaped[Array, "S ..."]:
    """Padded to a length, with zeros or with the last entry."""
    widths = [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, widths, mode=mode)
