"""What lives on the device from step to step; every leaf is donated to each step."""

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jllm.sampling.rows import SamplingRows
from jllm.types import EngineRequest

Leaf = Any
"""An array, or what stands for it in a tree of the same structure: its shape, its
sharding."""

NUM_STOP_IDS = 8
"""Stop tokens that a row knows; the host checks the others one step later."""


class RowField(enum.IntEnum):
    """Columns of the row table; the float ones hold the bits of a float32."""

    LAST_TOKEN = 0
    POSITION = 1
    DONE = 2
    PROMPT_LEN = 3
    END = 4
    MIN_TOKENS = 5
    TOP_K = 6
    SEED_LOW = 7
    SEED_HIGH = 8
    TEMPERATURE = 9
    TOP_P = 10
    MIN_P = 11
    PRESENCE = 12
    FREQUENCY = 13
    REPETITION = 14
    FIRST_STOP_ID = 15


NUM_FIELDS = RowField.FIRST_STOP_ID + NUM_STOP_IDS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowTable:
    """One row per running sequence, one column per `RowField`.

    POSITION counts the tokens whose KV is in the cache; LAST_TOKEN is the newest token,
    which is not among them yet. END is the length at which the sequence is full. A row
    that is DONE computes nothing until it starts again.
    """

    fields: Leaf  # i32[R, F]

    def integer(self, field: RowField) -> Int[Array, " R"]:
        """An integer column."""
        return self.fields[:, field]

    def number(self, field: RowField) -> Float[Array, " R"]:
        """A float32 column."""
        return jax.lax.bitcast_convert_type(self.fields[:, field], jnp.float32)

    def stop_ids(self) -> Int[Array, "R N"]:
        """Stop tokens of each row, padded with -1."""
        return self.fields[:, RowField.FIRST_STOP_ID :]

    def take(self, rows: Int[Array, " S"]) -> "RowTable":
        """The rows of a step; ids past the table give any row."""
        return RowTable(self.fields.at[rows].get(mode="clip"))

    def put(self, rows: Int[Array, " S"], values: Int[Array, "S F"]) -> "RowTable":
        """Replaces rows; ids past the table, all distinct, are dropped."""
        fields = self.fields.at[rows].set(values, mode="drop", unique_indices=True)
        return RowTable(fields)

    def sampling(self, position: Int[Array, " S"]) -> SamplingRows:
        """The sampling parameters, for tokens sampled at these positions."""
        seeds = self.fields[:, RowField.SEED_LOW : RowField.SEED_HIGH + 1]
        return SamplingRows(
            temperature=self.number(RowField.TEMPERATURE),
            top_p=self.number(RowField.TOP_P),
            min_p=self.number(RowField.MIN_P),
            presence=self.number(RowField.PRESENCE),
            frequency=self.number(RowField.FREQUENCY),
            repetition=self.number(RowField.REPETITION),
            top_k=self.integer(RowField.TOP_K),
            seed=jax.lax.bitcast_convert_type(seeds, jnp.uint32),
            position=position,
            prompt_len=self.integer(RowField.PROMPT_LEN),
            min_tokens=self.integer(RowField.MIN_TOKENS),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """Device state of the engine.

    Attributes:
        kv: The paged KV pools, one leaf per layer, as large as its cache group's.
        block_tables: Pool blocks of each row, in order of position.
        window_tables: The same for each cache group with a window. Entries before the
            window are of blocks that may belong to others by now.
        block_tokens: Token of every place of the pool; through the tables it is the
            token history of each row, shared and copied along with the blocks.
        rows: Position, last token and sampling parameters of each row.
        flights: What is on its way through a pipeline; nothing elsewhere.
    """

    kv: tuple[Leaf, ...]  # one [B, 2, K, P, D] per layer
    block_tables: Leaf  # i32[R, M]
    block_tokens: Leaf  # i32[B, P]
    rows: RowTable
    window_tables: tuple[Leaf, ...] = ()  # one i32[R, M] per group
    flights: Leaf = ()


def row_fields(
    request: EngineRequest,
    *,
    position: int,
    end: int,
    seed: int,
    stop_token_ids: tuple[int, ...],
) -> np.ndarray:
    """The i32 row with which a sequence starts, or resumes after a preemption."""
    params = request.params
    fields = np.zeros(NUM_FIELDS, np.int32)
    fields[RowField.POSITION] = position
    fields[RowField.PROMPT_LEN] = len(request.prompt_token_ids)
    fields[RowField.END] = end
    fields[RowField.MIN_TOKENS] = params.min_tokens
    fields[RowField.TOP_K] = min(params.top_k, 2**31 - 1)
    seeds = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], np.uint32)
    fields[RowField.SEED_LOW : RowField.SEED_HIGH + 1] = seeds.view(np.int32)
    numbers = np.array(
        [
            params.temperature,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        ],
        np.float32,
    )
    fields[RowField.TEMPERATURE : RowField.REPETITION + 1] = numbers.view(np.int32)
    stop_ids = stop_token_ids[:NUM_STOP_IDS]
    fields[RowField.FIRST_STOP_ID :] = -1
    fields[RowField.FIRST_STOP_ID : RowField.FIRST_STOP_ID + len(stop_ids)] = stop_ids
    return fields
