"""The compiled programs of a model: a few sizes (buckets) of each step function.

Context length is never a bucket, since kernels loop to the real length. Compiling runs
in threads; a step always takes the smallest program that is ready and large enough.
"""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jllm.engine.background import BackgroundWork
from jllm.engine.inputs import InputLayout
from jllm.engine.state import NUM_FIELDS, EngineState, RowTable
from jllm.engine.steps import (
    StepResult,
    decode_step,
    prefill_step,
    prompt_logprobs_step,
    sampler_step,
)
from jllm.layers.attention import KV_HEADS
from jllm.layers.kernels import Fallback, collect_fallbacks
from jllm.models.base import Model, Weights
from jllm.sampling.draws import DrawMethod
from jllm.sampling.logprobs import PROMPT_CHUNK

LOGITS_COPIES = 6
"""Arrays of the size of the logits that the sampler programs hold at once, at most."""

Compiled = Any
"""A compiled program, called with the arrays it was compiled for."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProgramSizes:
    """The buckets of a model.

    Attributes:
        rows: Rows of the decode programs, ascending; the last is the whole table.
        tokens: Tokens of the prefill programs, ascending; the last is the budget.
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...]


def choose_sizes(platform: str, max_num_seqs: int, token_budget: int) -> ProgramSizes:
    """Few sizes: a decode step costs little more for rows that are not used."""
    rows = (1, 4, 16) if platform == "cpu" else (8, 32, 128)
    tokens = (64, 256) if platform == "cpu" else (256, 1024)
    return ProgramSizes(
        rows=(*(size for size in rows if size < max_num_seqs), max_num_seqs),
        tokens=(*(size for size in tokens if size < token_budget), token_budget),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class ProgramOptions:
    """What is the same in all programs of a model.

    Attributes:
        sizes: The buckets.
        num_blocks: Blocks `B` of the pool.
        block_size: Places `P` per block.
        max_blocks: Blocks `M` per row at most.
        max_appends: Most blocks appended in a prefill step.
        max_copies: Most blocks copied in a prefill step.
        num_logprobs: Log-probabilities that the sampler program returns per token.
        rule_size: Length `X` of a row's packed sampling rules.
        draw_method: How a token is drawn.
    """

    sizes: ProgramSizes
    num_blocks: int
    block_size: int
    max_blocks: int
    max_appends: int
    max_copies: int
    num_logprobs: int
    rule_size: int
    draw_method: DrawMethod

    @property
    def table_rows(self) -> int:
        """Rows `R` of the device table."""
        return self.sizes.rows[-1]

    def layout(self, kind: Any, size: int) -> InputLayout:
        """Input layout of a step program."""
        return InputLayout(
            kind=kind,
            num_rows=size if kind == "decode" else self.table_rows,
            num_tokens=size,
            table_rows=self.table_rows,
            num_pool_blocks=self.num_blocks,
            max_appends=self.max_appends,
            max_copies=self.max_copies,
        )


def describe_state(
    model: Model, options: ProgramOptions, place: NamedSharding
) -> EngineState:
    """Shapes, types and shardings of the device state.

    The pool is sharded over its KV heads, everything else lives at `place`.
    """
    pool = jax.ShapeDtypeStruct(
        model.kv_shape(options.num_blocks, options.block_size),
        model.kv_dtype,
        sharding=NamedSharding(place.mesh, KV_HEADS),
    )

    def table(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)

    return EngineState(
        kv=(pool,) * model.num_layers,
        block_tables=table(options.table_rows, options.max_blocks),
        block_tokens=table(options.num_blocks, options.block_size),
        rows=RowTable(table(options.table_rows, NUM_FIELDS)),
    )


def init_state(description: EngineState) -> EngineState:
    """An empty device state: zeros, since a NaN in an unused place would spread."""
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
        description,
    )


def describe(tree: Any) -> Any:
    """Shapes, types and shardings of a tree of arrays, for lowering."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        tree,
    )


class ProgramBuilder:
    """Lowers and compiles the programs of one model from shapes alone.

    Args:
        model: The network.
        options: Sizes.
        weights: Tree of arrays or of their descriptions.
        place: Where inputs and small results live.
    """

    def __init__(
        self,
        model: Model,
        options: ProgramOptions,
        weights: Weights,
        place: NamedSharding,
    ) -> None:
        """Keeps descriptions only, no arrays."""
        self._model, self._options, self._place = model, options, place
        self._weights = describe(weights)
        self._state = describe_state(model, options, place)
        self.fallbacks: set[Fallback] = set()

    def step(self, kind: str, size: int) -> Compiled:
        """A decode program of `size` rows, or a prefill program of `size` tokens."""
        layout = self._options.layout(kind, size)
        function = decode_step if kind == "decode" else prefill_step
        step = partial(function, self._model, layout, self._options.draw_method)
        vector = self._array((layout.size,), jnp.int32)
        return self._compile(step, (self._weights, self._state, vector), state_at=1)

    def sampler(self, num_rows: int) -> Compiled:
        """The second program of a step of `num_rows` rows with sampling rules."""
        options = self._options
        step = partial(sampler_step, options.draw_method, options.num_logprobs)
        arguments = (
            self._state,
            self.result(num_rows).logits,
            self._array((num_rows,), jnp.int32),
            self._array((options.table_rows, options.rule_size), jnp.int32),
        )
        return self._compile(step, arguments, state_at=0)

    def prompt_logprobs(self) -> Compiled:
        """The second program of a prefill step of the largest size."""
        options = self._options
        step = partial(
            prompt_logprobs_step, self._model, options.draw_method, options.num_logprobs
        )
        size = options.sizes.tokens[-1]
        result = self.result(options.table_rows)
        hidden = self._array((size, result.hidden.shape[1]), result.hidden.dtype)
        arguments = (
            self._weights,
            self._state,
            dataclasses.replace(result, hidden=hidden),
            self._array((size,), jnp.int32),
            self._array((options.table_rows, options.rule_size), jnp.int32),
        )
        return self._compile(step, arguments, state_at=1)

    def result(self, num_rows: int) -> StepResult:
        """Description of what a decode step of `num_rows` rows leaves."""
        layout = self._options.layout("decode", num_rows)
        step = partial(decode_step, self._model, layout, self._options.draw_method)
        vector = self._array((layout.size,), jnp.int32)
        _, result = jax.eval_shape(step, self._weights, self._state, vector)
        placed = jax.tree.map(lambda x: self._array(x.shape, x.dtype), result)
        logits = jax.ShapeDtypeStruct(
            result.logits.shape, result.logits.dtype, sharding=self._logits_place
        )
        return placed.replace(logits=logits)

    @property
    def _logits_place(self) -> Sharding:
        """Logits stay where the vocabulary is."""
        return NamedSharding(self._place.mesh, PartitionSpec(None, "tensor"))

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._place)

    def _compile(
        self, step: Callable[..., Any], arguments: tuple[Any, ...], state_at: int | None
    ) -> Compiled:
        """Compiles with the state donated and every result placed."""
        # Traced here; lowering finds the trace again.
        with collect_fallbacks() as found:
            result = jax.eval_shape(step, *arguments)
        self.fallbacks.update(found)
        places: Any = jax.tree.map(lambda _: self._place, result)
        if state_at is not None:
            state = jax.tree.map(lambda leaf: leaf.sharding, self._state)
            rest = places[1]
            if isinstance(result[1], StepResult):
                rest = rest.replace(logits=self._logits_place)
            places = (state, rest)
        jitted = jax.jit(
            step,
            donate_argnums=() if state_at is None else state_at,
            out_shardings=places,
            keep_unused=True,
        )
        return jitted.lower(*arguments).compile()


def fresh_bytes(program: Compiled) -> int:
    """Scratch memory of a program and its results that replace no argument."""
    analysis = program.memory_analysis()
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.temp_size_in_bytes + max(0, fresh)


class Programs:
    """The programs of one engine, compiled in the background.

    Ready after two, the largest prefill and the smallest decode: any step can run on
    the largest prefill program.
    """

    def __init__(self, builder: ProgramBuilder, options: ProgramOptions) -> None:
        """Compiles nothing yet."""
        self._builder, self._options = builder, options
        self._lock = threading.Lock()
        self._futures: dict[tuple[str, int], Future[Compiled]] = {}
        self._background = BackgroundWork(2, "jllm-compile")

    @property
    def num_fallbacks(self) -> int:
        """Kernels of the accelerator that could not be used, each reason once."""
        return len(self._builder.fallbacks)

    def compile_first(self) -> None:
        """Compiles the two programs with which every step can run."""
        sizes = self._options.sizes
        first = [("prefill", sizes.tokens[-1]), ("decode", sizes.rows[0])]
        for future in [self._submit(key) for key in first]:
            future.result()

    def compile_rest(self) -> None:
        """Starts to compile the others in the background."""
        for key in self.all_keys():
            self._submit(key)

    def all_keys(self) -> list[tuple[str, int]]:
        """Every program, those needed soonest first."""
        sizes = self._options.sizes
        return [
            *(("decode", size) for size in reversed(sizes.rows)),
            *(("prefill", size) for size in sizes.tokens),
            *(("sampler", size) for size in reversed(sizes.rows)),
            ("prompt_logprobs", sizes.tokens[-1]),
        ]

    def wait(self) -> None:
        """Returns when every program is compiled."""
        for key in self.all_keys():
            self.get(*key)

    def step(self, *, is_decode: bool, num_rows: int, num_tokens: int) -> Any:
        """Layout and program of the smallest ready size that holds the step."""
        sizes = self._options.sizes
        if is_decode:
            for size in sizes.rows:
                if size >= num_rows and self._is_ready(("decode", size)):
                    return self._layout_and_program("decode", size)
        for size in sizes.tokens:
            if size >= num_tokens and self._is_ready(("prefill", size)):
                return self._layout_and_program("prefill", size)
        raise AssertionError(f"no program for {num_tokens} tokens")

    def get(self, kind: str, size: int) -> Compiled:
        """A program; waits until it is compiled."""
        return self._submit((kind, size)).result()

    def largest_prefill(self) -> Any:
        """Layout and program of the largest prefill size."""
        return self._layout_and_program("prefill", self._options.sizes.tokens[-1])

    def sampler(self, num_rows: int) -> Compiled:
        """The sampler program for a step of `num_rows` rows; waits for it."""
        return self.get("sampler", num_rows)

    def prompt_logprobs(self) -> Compiled:
        """The prompt log-probability program; waits for it."""
        return self._submit(
            ("prompt_logprobs", self._options.sizes.tokens[-1])
        ).result()

    def temporary_bytes(self) -> int:
        """Scratch memory and results of the largest program, per device.

        That is the largest prefill, or one that looks at whole rows of logits; these
        are compiled later, hence estimated.
        """
        _, program = self.largest_prefill()
        logits = self._builder.result(self._options.table_rows).logits
        shard = logits.sharding.shard_shape(logits.shape)
        rows = shard[0] + PROMPT_CHUNK
        return max(fresh_bytes(program), LOGITS_COPIES * 4 * rows * shard[1])

    def close(self) -> None:
        """Drops what is not being compiled yet and waits for the rest."""
        self._background.close()

    def _layout_and_program(self, kind: str, size: int) -> tuple[InputLayout, Compiled]:
        layout = self._options.layout(kind, size)
        return layout, self.get(kind, size)

    def _is_ready(self, key: tuple[str, int]) -> bool:
        future = self._futures.get(key)
        return future is not None and future.done()

    def _submit(self, key: tuple[str, int]) -> Future[Compiled]:
        with self._lock:
            if key not in self._futures:
                self._futures[key] = self._background.submit(partial(self._build, key))
            return self._futures[key]

    def _build(self, key: tuple[str, int]) -> Compiled:
        kind, size = key
        if kind == "sampler":
            return self._builder.sampler(size)
        if kind == "prompt_logprobs":
            return self._builder.prompt_logprobs()
        return self._builder.step(kind, size)
