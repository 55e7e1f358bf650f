"""The pure step functions, the only jitted code on the path of a token.

A step is: apply updates, gather the batch, forward, sample, record. Both steps take and
return the whole device state, which is donated: every leaf keeps its address.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jllm.engine.batches import (
    Turn,
    drop_unless,
    enter_decode,
    enter_prefill,
    record_tokens,
)
from jllm.engine.inputs import (
    DecodeInput,
    InputLayout,
    PrefillInput,
    split_vector,
)
from jllm.engine.scoring import Drawn, draw_tokens, score, score_sampling_rows
from jllm.engine.state import EngineState, Leaf, RowField, RowTable
from jllm.models.base import Batch, KVCache, Model, Weights
from jllm.sampling.draws import DrawMethod
from jllm.sampling.logprobs import FINITE, prompt_logprobs
from jllm.sampling.rows import TokenHistory
from jllm.sampling.rules import RuleLayout, restrict
from jllm.sampling.sampler import SamplerOptions, sample

Forward = Callable[[Weights, KVCache, Batch], tuple[Array, KVCache]]
"""What computes hidden states in a step: the model's own function, or a probed one."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device.

    Attributes:
        packed: Token and flags of each row; all that a plain step copies back.
        logits: Scores from which the token was drawn, for the sampler program.
        sampled_rows: Row of the table that sampled; past the table where none did.
        hidden: Hidden states of all tokens, for prompt log-probabilities.
        captured: Activations of all tokens by name; none but in a probed step.
    """

    packed: Leaf  # i32[S, 2]
    logits: Leaf  # f32[S, V]
    sampled_rows: Leaf  # i32[S]
    hidden: Leaf  # [T, E]
    captured: Mapping[str, Leaf] = dataclasses.field(default_factory=dict[str, Leaf])


class SamplerInput(NamedTuple):
    """What the host tells the sampler programs.

    Attributes:
        rules: Packed rules of all rows of the table.
        allowed: Bit set of the ids that the grammar of each row of the step allows; all
            ones without a grammar.
        arguments: Those of the logits processors for all rows of the table.
    """

    rules: Leaf  # i32[R, X]
    allowed: Leaf  # i32[S, A]
    arguments: tuple[Leaf, ...] = ()  # [R, ...] each


def decode_step(
    model: Model,
    layout: InputLayout,
    method: DrawMethod,
    weights: Weights,
    state: EngineState,
    vector: Int[Array, " I"],
    forward: Forward | None = None,
) -> tuple[EngineState, StepResult]:
    """Computes the last sampled token of each row and samples the next.

    Donates: state.
    """
    inputs = DecodeInput(**split_vector(layout, vector))
    state, turn, batch = enter_decode(model.cache_groups, layout, state, inputs)
    state, hidden = _forward(forward or model.forward, weights, state, batch)
    sampling = turn.sampling()
    scores = score(model, method, weights, layout.num_rows, hidden, sampling)
    return record_drawn(state, turn, draw_tokens(scores, method, sampling), hidden)


def prefill_step(
    model: Model,
    layout: InputLayout,
    method: DrawMethod,
    weights: Weights,
    state: EngineState,
    vector: Int[Array, " I"],
    forward: Forward | None = None,
) -> tuple[EngineState, StepResult]:
    """Computes prompt chunks and single tokens in any mix.

    Donates: state.
    """
    inputs = PrefillInput(**split_vector(layout, vector))
    state, turn, batch = enter_prefill(model.cache_groups, layout, state, inputs)
    state, hidden = _forward(forward or model.forward, weights, state, batch)
    last = hidden.at[batch.row_starts[1:] - 1].get(mode="clip")
    scores = score_sampling_rows(
        partial(score, model, method, weights),
        layout.scored_rows,
        last,
        turn.sampling(),
        jnp.sum(inputs.samples),
    )
    drawn = draw_tokens(scores, method, turn.sampling())
    return record_drawn(state, turn, drawn, hidden)


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
    arguments = tuple(
        table.at[sampled_rows].get(mode="clip") for table in inputs.arguments
    )
    result = sample(
        logits, rows.sampling(positions), history, own_rules, options, arguments
    )
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


def _forward(
    forward: Forward, weights: Weights, state: EngineState, batch: Batch
) -> tuple[EngineState, Float[Array, "T E"]]:
    """Runs the network and records the tokens of the places that it wrote."""
    hidden, kv = forward(weights, state.kv, batch)
    return record_tokens(dataclasses.replace(state, kv=kv), batch), hidden


def record_drawn(
    state: EngineState, turn: Turn, drawn: Drawn, hidden: Float[Array, "T E"]
) -> tuple[EngineState, StepResult]:
    """Advances the rows, and puts together what the step leaves on the device."""
    moved = turn.rows.fields.at[:, RowField.POSITION].set(turn.positions())
    fields = _record(RowTable(moved), drawn.tokens, turn.samples)
    result = StepResult(
        packed=jnp.stack([drawn.tokens, jnp.where(drawn.finite, FINITE, 0)], axis=1),
        logits=drawn.logits,
        sampled_rows=drop_unless(turn.samples, turn.row_ids, state),
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
