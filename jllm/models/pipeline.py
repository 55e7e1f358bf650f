"""A decoder whose layers are shared out over the stages of a pipeline.

One program runs on all devices. Weights and KV pools have a leaf per place of a stage,
stacked over the stages and divided among them. In every tick each stage runs its layers
over the microbatch that it holds, and hands the hidden states on to the next one.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from jllm.errors import ConfigError
from jllm.layers.attention import KV_HEADS, copy_cache_blocks
from jllm.layers.batch import WindowTables
from jllm.layers.kernels import TileLayout
from jllm.models.base import (
    Batch,
    CacheGroup,
    KVCache,
    Model,
    ModelOptions,
    Weights,
)
from jllm.models.decoder import Decoder
from jllm.models.probe import Edits, Probe
from jllm.models.stages import StackedSpec, StageLayout, lay_out_stages

PIPE = "pipe"
STACKED = ("layers", "norms", "norm_biases", "qk_norms")
"""Parameters of the layers; the others belong to no stage."""
STAGED_KV = PartitionSpec(PIPE, *KV_HEADS)
"""How the pool of a place is divided: `[stages, B, 2, K, P, D]`."""
OF_STAGE = PartitionSpec(PIPE)
EVERYWHERE = PartitionSpec()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Microbatch:
    """What the stages need to know of a microbatch beside its hidden states.

    A `Batch`, but that microbatches can be stacked, or be shapes instead of arrays.

    Attributes:
        tokens: As in `Batch`, like those that follow.
        positions: Position of each token in its own sequence.
        row_starts: First token of each row, then their number.
        lengths: Tokens of each row in the cache after the step.
        slots: Where keys and values go, in each cache group.
        block_tables: Pool blocks of each row, in each cache group.
        copies: Blocks to be copied before, as sources and targets in each cache group;
            none where the program copies nothing.
        is_decode: Whether every row has exactly one token.
    """

    tokens: Any  # i32[T]
    positions: Any  # i32[T]
    row_starts: Any  # i32[S + 1]
    lengths: Any  # i32[S]
    slots: tuple[Any, ...]  # i32[T]
    block_tables: tuple[Any, ...]  # i32[S, M]
    copies: tuple[tuple[Any, Any], ...] = ()  # i32[C] twice
    is_decode: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(
        cls, batch: Batch, copies: tuple[tuple[Array, Array], ...] = ()
    ) -> "Microbatch":
        """A batch with the copies that go before it."""
        return cls(
            tokens=batch.tokens,
            positions=batch.positions,
            row_starts=batch.row_starts,
            lengths=batch.lengths,
            slots=(batch.slots, *(tables.slots for tables in batch.windows)),
            block_tables=(
                batch.block_tables,
                *(tables.block_tables for tables in batch.windows),
            ),
            copies=copies,
            is_decode=batch.is_decode,
        )

    def batch(self) -> Batch:
        """It as a batch again, if it is one and not a stack."""
        full, *windows = map(WindowTables, self.slots, self.block_tables)
        return Batch(
            tokens=self.tokens,
            positions=self.positions,
            slots=full.slots,
            block_tables=full.block_tables,
            row_starts=self.row_starts,
            lengths=self.lengths,
            windows=tuple(windows),
            is_decode=self.is_decode,
        )


@dataclasses.dataclass(frozen=True)
class PipelinedDecoder:
    """A decoder over several stages.

    Attributes:
        whole: The decoder, with the mesh of all stages.
    """

    whole: Decoder

    def __post_init__(self) -> None:
        """Refuses more stages than layers."""
        num_layers = self.whole.num_layers
        if self.num_stages > num_layers:
            raise ConfigError(
                f"pipeline_parallel_size={self.num_stages} must be at most the "
                f"{num_layers} layers of the model"
            )

    @property
    def options(self) -> ModelOptions:
        """What the engine decided."""
        return self.whole.options

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return self.options.pipe_size

    @cached_property
    def layout(self) -> StageLayout:
        """Which layer is where."""
        ropes = (layer.rope for layer in self.whole.config.layers)
        kinds = tuple(zip(ropes, self.whole.windows, strict=True))
        return lay_out_stages(kinds, self.num_stages)

    @cached_property
    def stage(self) -> Decoder:
        """What one stage runs on its own weights and pools."""
        layers = tuple(self.whole.config.layers[i] for i in self.layout.first_layers)
        config = dataclasses.replace(self.whole.config, layers=layers)
        mesh = None
        if self.options.tensor_size > 1:
            assert self.options.mesh is not None
            mesh = self.options.mesh.abstract_mesh.update_axis_types(
                {PIPE: AxisType.Manual}
            )
        return Decoder(config, dataclasses.replace(self.options, mesh=mesh))

    @property
    def width(self) -> int:
        """Length `E` of the hidden states."""
        return self.whole.width

    @property
    def vocab_size(self) -> int:
        """Number of token ids, without padding."""
        return self.whole.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """Width of the logits, which all devices share evenly."""
        return self.whole.padded_vocab_size

    @property
    def num_layers(self) -> int:
        """Number of leaves of the KV cache: the places of a stage."""
        return self.layout.num_places

    @property
    def cache_groups(self) -> tuple[CacheGroup, ...]:
        """Which leaves are kept for how long."""
        return self.stage.cache_groups

    @property
    def kv_dtype(self) -> str:
        """Type of the KV pool."""
        return self.whole.kv_dtype

    def kv_shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """Shape `(B, 2, K, P, D)` of one layer's pool."""
        return self.whole.kv_shape(num_blocks, block_size)

    def tile_layout(self, block_size: int) -> TileLayout | None:
        """None: microbatches of any kind meet in one program, which cuts the tokens."""
        del block_size
        return None

    def init_kv(self, num_blocks: int, block_size: int) -> KVCache:
        """An empty cache, one leaf `[stages, B, 2, K, P, D]` per place."""
        assert self.options.mesh is not None
        shape = (self.num_stages, *self.kv_shape(num_blocks, block_size))
        place = NamedSharding(self.options.mesh, STAGED_KV)
        return tuple(
            jnp.zeros(shape, self.kv_dtype, device=place)
            for _ in range(self.num_layers)
        )

    def specs(self) -> dict[str, Any]:
        """The tree of `ParamSpec`, and of `StackedSpec` for what is in the layers."""
        stages = [
            self.whole.specs(self.layout.loaded(stage))
            for stage in range(self.num_stages)
        ]

        def stack(*members: Any) -> StackedSpec:
            return StackedSpec(members)

        return {
            name: jax.tree.map(stack, *(stage[name] for stage in stages))
            if name in STACKED
            else of_first
            for name, of_first in stages[0].items()
        }

    @property
    def activations(self) -> tuple[str, ...]:
        """None: no place of a program belongs to one layer alone."""
        return ()

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

        One batch alone on its way through all stages: as many ticks, in each of which
        one stage writes to its pools. See `Decoder.forward`.
        """
        probe = Probe(self.activations, capture or (), edit)
        entering = self.whole.embedded(weights, batch)
        stages = jnp.arange(self.num_stages)
        hidden = jnp.zeros((self.num_stages, *entering.shape), entering.dtype)
        final = entering
        for turn in range(self.num_stages):
            alone = self._alone(batch, kv, stages == turn)
            final, hidden, kv = self.advance(
                weights, kv, entering, hidden, alone, stages
            )
        return (final, kv) if capture is None else (final, kv, probe.captured)

    def _alone(self, batch: Batch, kv: KVCache, takes_turn: Array) -> Microbatch:
        """The batch for every stage, with slots past the pool where it has no turn."""
        everywhere = jax.tree.map(
            lambda x: jnp.broadcast_to(x[None], (self.num_stages, *x.shape)),
            Microbatch.of(batch),
        )
        past = max(pool.shape[1] * pool.shape[4] for pool in kv)
        nowhere = past + jnp.arange(batch.slots.shape[0], dtype=jnp.int32)[None, :]
        slots = tuple(
            jnp.where(takes_turn[:, None], of_group, nowhere)
            for of_group in everywhere.slots
        )
        return dataclasses.replace(everywhere, slots=slots)

    def logits(
        self, weights: Weights, hidden: Float[Array, "N E"]
    ) -> Float[Array, "N V"]:
        """Scores of the next token in float32; padded ids are minus infinity."""
        return self.whole.logits(weights, hidden)

    def advance(
        self,
        weights: Weights,
        kv: KVCache,
        entering: Float[Array, "T E"],
        hidden: Float[Array, "N T E"],
        microbatches: Microbatch,
        places: Int[Array, " N"],
    ) -> tuple[Float[Array, "T E"], Float[Array, "N T E"], KVCache]:
        """One tick: every stage runs its layers and hands on what they leave.

        Args:
            weights: Arrays of the tree `specs`.
            kv: The cache.
            entering: Embeddings of the microbatch that the first stage takes.
            hidden: What each other stage takes.
            microbatches: All that are on their way, stacked in any order.
            places: Where among them that of each stage is.

        Returns:
            What the last stage leaves, after the last norm; what each stage takes in
            the next tick; and the cache.
        """
        mesh, layout = self.options.mesh, self.layout
        assert mesh is not None
        # By the compiler the layers are divided over `tensor`, if it has devices.
        is_shared = self.options.tensor_size > 1
        axes = frozenset({PIPE}) if is_shared else frozenset(mesh.axis_names)
        run = jax.shard_map(
            self._run_stage,
            mesh=mesh,
            axis_names=axes,
            in_specs=(OF_STAGE, OF_STAGE, EVERYWHERE, OF_STAGE, EVERYWHERE)
            + (OF_STAGE,) * 3,
            out_specs=(EVERYWHERE, OF_STAGE, OF_STAGE),
            check_vma=False,
        )
        takes_part = [[i is not None for i in stage] for stage in layout.layers]
        return run(
            {name: weights[name] for name in STACKED if name in weights},
            kv,
            entering,
            hidden,
            microbatches,
            places,
            jnp.arange(self.num_stages),
            jnp.asarray(takes_part),
        )

    def _run_stage(
        self,
        weights: Weights,
        kv: KVCache,
        entering: Array,
        hidden: Array,
        microbatches: Microbatch,
        place: Array,
        number: Array,
        takes_part: Array,
    ) -> tuple[Array, Array, KVCache]:
        """A tick of one stage; divided arrays have a first dimension of one."""
        own = jax.tree.map(_only, weights)
        pools = tuple(_only(pool) for pool in kv)
        here = jax.tree.map(lambda x: _at(x, _only(place)), microbatches)
        is_first, is_last = (_only(number) == i for i in (0, self.num_stages - 1))
        taken = jnp.where(is_first, entering, _only(hidden))
        pools = self._copy_blocks(pools, here)
        left, pools = self.stage.run_layers(
            own,
            taken,
            pools,
            here.batch(),
            Probe((), (), None),
            self._taking_part(_only(takes_part)),
        )
        final = self.stage.final_norm(own, left)
        final = jax.lax.psum(jnp.where(is_last, final, jnp.zeros_like(final)), PIPE)
        onwards = [(i, i + 1) for i in range(self.num_stages - 1)]
        passed = jax.lax.ppermute(left, PIPE, onwards)
        return final, passed[None], tuple(pool[None] for pool in pools)

    def _taking_part(self, takes_part: Array) -> list[Array | None]:
        """Whether a stage has a layer at each place; None where all have one."""
        columns = zip(*self.layout.layers, strict=True)
        return [
            takes_part[i] if None in column else None
            for i, column in enumerate(columns)
        ]

    def _copy_blocks(
        self, pools: tuple[Array, ...], microbatch: Microbatch
    ) -> tuple[Array, ...]:
        if not microbatch.copies:
            return pools
        copied = list(pools)
        for group, pair in zip(self.cache_groups, microbatch.copies, strict=True):
            of_group = tuple(copied[layer] for layer in group.layers)
            for layer, pool in zip(
                group.layers, copy_cache_blocks(of_group, *pair), strict=True
            ):
                copied[layer] = pool
        return tuple(copied)


def pipelined(model: Model) -> PipelinedDecoder:
    """The model over the stages of its mesh.

    Raises:
        ConfigError: More stages than layers, or the model is no decoder of its kind.
    """
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"pipeline_parallel_size={model.options.pipe_size} must be 1 for a "
            f"{type(model).__name__}"
        )
    return PipelinedDecoder(model)


def _only(x: Array) -> Array:
    """The one entry of the first dimension; a reshape, so that nothing is copied."""
    return x.reshape(x.shape[1:])


def _at(x: Array, place: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, place, keepdims=False)
