"""The pure step functions, the only jitted code on the path of a token.

A step is: apply updates, gather the batch, forward, sample, record. Both steps take and
return the whole device state, which is donated: every leaf keeps its address.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jllm.engine.cache_groups import append_to_tables, copy_blocks, window_tables
from jllm.engine.inputs import (
    DecodeInput,
    InputLayout,
    PrefillInput,
    split_vector,
)
from jllm.engine.scoring import Drawn, draw_tokens, score
from jllm.engine.state import EngineState, Leaf, RowField, RowTable
from jllm.layers.kernels import TileTable
from jllm.models.base import Batch, Model, Weights
from jllm.sampling.draws import DrawMethod
from jllm.sampling.logprobs import FINITE, prompt_logprobs
from jllm.sampling.rows import SamplingRows, TokenHistory
from jllm.sampling.rules import RuleLayout, restrict
from jllm.sampling.sampler import SamplerOptions, sample
from jllm.scheduler.plan import NO_BLOCK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device.

    Attributes:
        packed: Token and flags of each row; all that a plain step copies back.
        logits: Scores from which the token was drawn, for the sampler program.
        sampled_rows: Row of the table that sampled; past the table where none did.
        hidden: Hidden states of all tokens, for prompt log-probabilities.
    """

    packed: Leaf  # i32[S, 2]
    logits: Leaf  # f32[S, V]
    sampled_rows: Leaf  # i32[S]
    hidden: Leaf  # [T, E]


class SamplerInput(NamedTuple):
    """What the host tells the sampler programs.

    Attributes:
        rules: Packed rules of all rows of the table.
        allowed: Bit set of the ids that the grammar of each row of the step allows; all
            ones without a grammar.
    """

    rules: Leaf  # i32[R, X]
    allowed: Leaf  # i32[S, A]


class Turn(NamedTuple):
    """The rows of a step and how far each goes.

    Attributes:
        row_ids: Row of the table; ids past it are padding.
        rows: Their entries before the step.
        advance: Tokens that each computes.
        samples: Which of them sample a token.
    """

    row_ids: Int[Array, " S"]
    rows: RowTable
    advance: Int[Array, " S"]
    samples: Bool[Array, " S"]

    def positions(self) -> Int[Array, " S"]:
        """Length of each row after the step."""
        return self.rows.integer(RowField.POSITION) + self.advance

    def sampling(self) -> SamplingRows:
        """How the next token of each row is drawn."""
        return self.rows.sampling(self.positions())


def decode_step(
    model: Model,
    layout: InputLayout,
    method: DrawMethod,
    weights: Weights,
    state: EngineState,
    vector: Int[Array, " I"],
) -> tuple[EngineState, StepResult]:
    """Computes the last sampled token of each row and samples the next.

    Donates: state.
    """
    inputs = DecodeInput(**split_vector(layout, vector))
    rows = state.rows.take(inputs.rows)
    positions = rows.integer(RowField.POSITION)
    live = _live(rows, inputs.rows, state)
    block_size = state.block_tokens.shape[1]
    appends = live & (inputs.blocks != NO_BLOCK)
    state = append_to_tables(
        state,
        _drop_unless(appends, inputs.rows, state),
        positions // block_size,
        inputs.blocks,
        inputs.window_blocks,
    )
    windows = window_tables(
        model.cache_groups,
        layout,
        state,
        inputs.rows,
        positions,
        inputs.rows,
        positions,
        live,
    )
    batch = Batch(
        tokens=rows.integer(RowField.LAST_TOKEN),
        positions=positions,
        slots=_slots(state, inputs.rows, positions, live),
        block_tables=state.block_tables.at[inputs.rows].get(mode="clip"),
        row_starts=jnp.arange(layout.num_rows + 1, dtype=jnp.int32),
        lengths=jnp.where(live, positions + 1, 0),
        windows=windows,
        is_decode=True,
    )
    state, hidden = _forward(model, weights, state, batch)
    turn = Turn(inputs.rows, rows, live.astype(jnp.int32), live)
    scores = score(model, method, weights, layout.num_rows, hidden, turn.sampling())
    drawn = draw_tokens(scores, method, turn.sampling())
    return _record_drawn(state, turn, drawn, hidden)


def prefill_step(
    model: Model,
    layout: InputLayout,
    method: DrawMethod,
    weights: Weights,
    state: EngineState,
    vector: Int[Array, " I"],
) -> tuple[EngineState, StepResult]:
    """Computes prompt chunks and single tokens in any mix.

    Donates: state.
    """
    inputs = PrefillInput(**split_vector(layout, vector))
    state = _apply_updates(model, state, inputs)
    rows = state.rows.take(inputs.rows)
    live = _live(rows, inputs.rows, state)
    batch = _ragged_batch(model, layout, state, inputs, rows, live)
    state, hidden = _forward(model, weights, state, batch)
    last = hidden.at[batch.row_starts[1:] - 1].get(mode="clip")
    advance = jnp.where(live, inputs.num_tokens, 0)
    turn = Turn(inputs.rows, rows, advance, live & (inputs.samples == 1))
    score_rows = partial(score, model, method, weights)
    counts = jnp.array(layout.scored_rows[:-1], jnp.int32)
    scores = jax.lax.switch(
        jnp.sum(jnp.sum(inputs.samples) > counts),
        [partial(score_rows, count) for count in layout.scored_rows],
        last,
        turn.sampling(),
    )
    drawn = draw_tokens(scores, method, turn.sampling())
    return _record_drawn(state, turn, drawn, hidden)


def sampler_step(
    options: SamplerOptions,
    state: EngineState,
    logits: Float[Array, "S V"],
    sampled_rows: Int[Array, " S"],
    inputs: SamplerInput,
) -> tuple[EngineState, Int[Array, "S W"]]:
    """Samples the rows of a step again, with every rule and with log-probabilities.

    Rows without rules get the token that the step itself drew. Donates: state.

    Args:
        options: What is the same for all rows and steps.
        state: Device state.
        logits: The model's scores.
        sampled_rows: Row of the table that each belongs to.
        inputs: Rules and grammars of the rows.
    """
    rows = state.rows.take(sampled_rows)
    positions = rows.integer(RowField.POSITION)
    history = TokenHistory(
        block_tokens=state.block_tokens,
        block_tables=state.block_tables.at[sampled_rows].get(mode="clip"),
        lengths=positions,
    )
    layout = RuleLayout(logits.shape[1])
    rules = inputs.rules.at[sampled_rows].get(mode="clip")
    own_rules = restrict(layout, rules, inputs.allowed)
    result = sample(logits, rows.sampling(positions), history, own_rules, options)
    fields = _record(rows, result.tokens, jnp.ones_like(positions, bool))
    state = dataclasses.replace(state, rows=state.rows.put(sampled_rows, fields))
    return state, result.packed


def prompt_logprobs_step(
    model: Model,
    options: SamplerOptions,
    weights: Weights,
    state: EngineState,
    result: StepResult,
    targets: Int[Array, " T"],
    inputs: SamplerInput,
) -> tuple[EngineState, tuple[Int[Array, "S W"], Int[Array, "T W"]]]:
    """Does what `sampler_step` does, and scores given next tokens of the prompt.

    Both in one program, so that no step has a third; never tokens x vocabulary in
    memory. Donates: state.
    """
    state, packed = sampler_step(
        options, state, result.logits, result.sampled_rows, inputs
    )
    scores = prompt_logprobs(
        result.hidden,
        targets,
        lambda some: model.logits(weights, some),
        options.num_logprobs,
    )
    return state, (packed, scores)


def _live(rows: RowTable, row_ids: Array, state: EngineState) -> Bool[Array, " S"]:
    """Rows that compute: within the table and not done."""
    in_table = row_ids < state.block_tables.shape[0]
    return in_table & (rows.integer(RowField.DONE) == 0)


def _drop_unless(
    keep: Bool[Array, " S"], row_ids: Int[Array, " S"], state: EngineState
) -> Int[Array, " S"]:
    """Row ids, replaced by distinct ones past the table where not `keep`."""
    num_rows = row_ids.shape[0]
    past = state.block_tables.shape[0] + num_rows + jnp.arange(num_rows)
    return jnp.where(keep, row_ids, past.astype(jnp.int32))


def _slots(
    state: EngineState,
    row_ids: Int[Array, " T"],
    positions: Int[Array, " T"],
    live: Bool[Array, " T"],
) -> Int[Array, " T"]:
    """Place of each token in the pool; distinct ones past it for tokens not live."""
    num_blocks, block_size = state.block_tokens.shape
    blocks = state.block_tables.at[row_ids, positions // block_size].get(mode="clip")
    past = num_blocks * block_size + jnp.arange(positions.shape[0])
    return jnp.where(
        live, blocks * block_size + positions % block_size, past.astype(jnp.int32)
    )


def _apply_updates(
    model: Model, state: EngineState, inputs: PrefillInput
) -> EngineState:
    """Copies blocks, initialises rows that start, appends to block tables."""
    state = copy_blocks(model.cache_groups, state, inputs)
    starting = _drop_unless(inputs.starts == 1, inputs.rows, state)
    rows = state.rows.put(starting, inputs.fields)
    ends = jnp.cumsum(inputs.num_blocks)
    entries = jnp.arange(inputs.blocks.shape[0], dtype=jnp.int32)
    owners = jnp.sum(entries[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    owners = jnp.minimum(owners, ends.shape[0] - 1)
    starts = (ends - inputs.num_blocks)[owners]
    columns = inputs.first_block[owners] + entries - starts
    used = entries < ends[-1]
    table_rows = jnp.where(used, inputs.rows[owners], state.block_tables.shape[0])
    # Unused entries are made distinct by their column; they are dropped by their row.
    columns = jnp.where(used, columns, entries)
    state = append_to_tables(
        state, table_rows, columns, inputs.blocks, inputs.window_blocks
    )
    return dataclasses.replace(state, rows=rows)


def _ragged_batch(
    model: Model,
    layout: InputLayout,
    state: EngineState,
    inputs: PrefillInput,
    rows: RowTable,
    live: Bool[Array, " S"],
) -> Batch:
    """Expands rows to tokens: which row, which position, which slot."""
    ends = jnp.cumsum(inputs.num_tokens)
    row_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    tokens = jnp.arange(layout.num_tokens, dtype=jnp.int32)
    owners = jnp.sum(tokens[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    used = owners < layout.num_rows
    owners = jnp.minimum(owners, layout.num_rows - 1)
    offsets = tokens - row_starts[owners]
    first = rows.integer(RowField.POSITION)
    positions = jnp.where(used, first[owners] + offsets, 0)
    last_tokens = rows.integer(RowField.LAST_TOKEN)
    uploaded = inputs.uploads[owners] == 1
    token_rows, computed = inputs.rows[owners], used & live[owners]
    return Batch(
        tokens=jnp.where(uploaded, inputs.tokens, last_tokens[owners]),
        positions=positions,
        slots=_slots(state, token_rows, positions, computed),
        block_tables=state.block_tables.at[inputs.rows].get(mode="clip"),
        row_starts=row_starts,
        lengths=jnp.where(live, first + inputs.num_tokens, inputs.num_tokens),
        tiles=_tile_table(layout, inputs),
        windows=window_tables(
            model.cache_groups,
            layout,
            state,
            inputs.rows,
            first,
            token_rows,
            positions,
            computed,
        ),
    )


def _tile_table(layout: InputLayout, inputs: PrefillInput) -> TileTable | None:
    if layout.tiles is None or inputs.tiles is None:
        return None
    return TileTable(inputs.tiles, layout.tiles)


def _forward(
    model: Model, weights: Weights, state: EngineState, batch: Batch
) -> tuple[EngineState, Float[Array, "T E"]]:
    """Runs the network and records the tokens of the places that it wrote."""
    hidden, kv = model.forward(weights, state.kv, batch)
    block_size = state.block_tokens.shape[1]
    block_tokens = state.block_tokens.at[
        batch.slots // block_size, batch.slots % block_size
    ].set(batch.tokens, mode="drop", unique_indices=True)
    return dataclasses.replace(state, kv=kv, block_tokens=block_tokens), hidden


def _record_drawn(
    state: EngineState, turn: Turn, drawn: Drawn, hidden: Float[Array, "T E"]
) -> tuple[EngineState, StepResult]:
    """Advances the rows, and puts together what the step leaves on the device."""
    moved = turn.rows.fields.at[:, RowField.POSITION].set(turn.positions())
    fields = _record(RowTable(moved), drawn.tokens, turn.samples)
    result = StepResult(
        packed=jnp.stack([drawn.tokens, jnp.where(drawn.finite, FINITE, 0)], axis=1),
        logits=drawn.logits,
        sampled_rows=_drop_unless(turn.samples, turn.row_ids, state),
        hidden=hidden,
    )
    rows = state.rows.put(turn.row_ids, fields)
    return dataclasses.replace(state, rows=rows), result


def _record(
    rows: RowTable, tokens: Int[Array, " S"], samples: Bool[Array, " S"]
) -> Int[Array, "S F"]:
    """Row table entries after sampling: last token, and whether the row is done."""
    length = rows.integer(RowField.POSITION) + 1
    stopped = jnp.any(tokens[:, None] == rows.stop_ids(), axis=1)
    num_output = length - rows.integer(RowField.PROMPT_LEN)
    stopped &= num_output > rows.integer(RowField.MIN_TOKENS)
    done = stopped | (length >= rows.integer(RowField.END))
    was_done = rows.integer(RowField.DONE) == 1
    done = jnp.where(samples, done, was_done)
    last = jnp.where(samples, tokens, rows.integer(RowField.LAST_TOKEN))
    fields = rows.fields.at[:, RowField.LAST_TOKEN].set(last)
    return fields.at[:, RowField.DONE].set(done.astype(jnp.int32))
