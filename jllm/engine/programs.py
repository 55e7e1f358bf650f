"""The compiled programs of a model: a few sizes (buckets) of each step function.

Context length is never a bucket, since kernels loop to the real length. Compiling runs
in threads; a step always takes the smallest program that is ready and large enough.
"""

import dataclasses
import os
import threading
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jllm.config import WindowPool
from jllm.engine.background import BackgroundWork
from jllm.engine.executables import Executable, ExecutableStore
from jllm.engine.inputs import InputLayout
from jllm.engine.memory import fresh_bytes, sampler_bytes
from jllm.engine.pipeline import describe_flights
from jllm.engine.state import NUM_FIELDS, EngineState, RowTable
from jllm.layers.attention import KV_HEADS
from jllm.layers.kernels import Fallback, TileLayout
from jllm.models.base import Model
from jllm.models.pipeline import STAGED_KV, PipelinedDecoder
from jllm.processors import LogitsProcessor
from jllm.sampling.draws import DrawMethod

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
    # On a CPU 8 rows take a fifth less than 16, and hardly more than 4.
    rows = (1, 8, 16) if platform == "cpu" else (8, 32, 128)
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
        tiles: How the tokens of a prefill step are cut for attention, if they are.
        branches: Whether a program may choose at run time what it computes, as the CPU
            can; on a GPU the host would have to be asked.
        window_pools: The pool of each cache group with a window.
        processors: Functions of the user in the sampler programs.
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
    tiles: TileLayout | None
    branches: bool
    window_pools: tuple[WindowPool, ...] = ()
    # Not told by what they print as, which differs from process to process.
    processors: tuple[LogitsProcessor, ...] = dataclasses.field(default=(), repr=False)

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
            tiles=self.tiles,
            scored_rows=self.sizes.rows if self.branches else (self.table_rows,),
            window_pool_blocks=tuple(pool.num_blocks for pool in self.window_pools),
        )


def describe_state(
    model: Model, options: ProgramOptions, place: NamedSharding
) -> EngineState:
    """Shapes, types and shardings of the device state.

    The pools are sharded over their KV heads, and in a pipeline over its stages;
    everything else lives at `place`.
    """
    of_stages = isinstance(model, PipelinedDecoder)
    stages = (model.num_stages,) if of_stages else ()
    sizes = (options.num_blocks, *(pool.num_blocks for pool in options.window_pools))
    num_blocks = {
        layer: size
        for group, size in zip(model.cache_groups, sizes, strict=True)
        for layer in group.layers
    }

    def pool(layer: int) -> Any:
        return jax.ShapeDtypeStruct(
            (*stages, *model.kv_shape(num_blocks[layer], options.block_size)),
            model.kv_dtype,
            sharding=NamedSharding(place.mesh, STAGED_KV if of_stages else KV_HEADS),
        )

    def table(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)

    largest = options.layout("prefill", options.sizes.tokens[-1])

    return EngineState(
        kv=tuple(pool(layer) for layer in range(model.num_layers)),
        block_tables=table(options.table_rows, options.max_blocks),
        window_tables=tuple(
            table(options.table_rows, options.max_blocks) for _ in options.window_pools
        ),
        block_tokens=table(options.num_blocks, options.block_size),
        rows=RowTable(table(options.table_rows, NUM_FIELDS)),
        flights=describe_flights(model, largest, options.max_blocks, place)
        if of_stages
        else (),
    )


def describe(tree: Any) -> Any:
    """Shapes, types and shardings of a tree of arrays, for lowering."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        tree,
    )


@runtime_checkable
class Builder(Protocol):
    """Lowers and compiles programs; see `jllm.engine.builder.ProgramBuilder`."""

    def build(self, kind: str, size: int) -> Executable:
        """Compiles a program."""
        ...

    def trees(self, kind: str) -> tuple[Any, Any]:
        """Arguments and result of the programs of a kind, as trees of anything."""
        ...

    def logits(self, num_rows: int) -> jax.ShapeDtypeStruct:
        """Description of the logits that a step of `num_rows` rows leaves."""
        ...


@runtime_checkable
class Readiness(Protocol):
    """What hosts tell each other of their programs."""

    def note_ready(self, num_blocks: int, key: tuple[str, int]) -> None:
        """Tells that a program can be used here, for a pool of so many blocks."""
        ...

    def is_ready(self, num_blocks: int, key: tuple[str, int]) -> bool:
        """Whether it can be used by the other hosts."""
        ...


def num_compile_threads() -> int:
    """Programs compiled at a time.

    XLA uses more than one core for each, in the threads that also run steps on a CPU.
    """
    return max(1, min(6, (os.cpu_count() or 2) // 2))


class Programs:
    """The programs of one engine, compiled in the background.

    Serves with two, one that makes the state and one prefill: any step of no more
    tokens than `token_limit` can run on a prefill program.

    Args:
        builder: Compiles a program.
        options: Sizes.
        store: Where executables are loaded from and perhaps written to, if anywhere.
        readiness: What the other hosts have, where there are some.
        first_tokens: Size of the prefill program that serves first, no smaller than the
            table has rows; None is the largest.
    """

    def __init__(
        self,
        builder: Builder,
        options: ProgramOptions,
        store: ExecutableStore | None = None,
        readiness: Readiness | None = None,
        first_tokens: int | None = None,
    ) -> None:
        """Compiles nothing yet."""
        self._builder, self._options, self._store = builder, options, store
        self._readiness, self._num_awaited = readiness, 0
        self._first = ("prefill", first_tokens or options.sizes.tokens[-1])
        self._lock = threading.Lock()
        self._futures: dict[tuple[str, int], Future[Compiled]] = {}
        self._empty: Future[EngineState] | None = None
        self._background = BackgroundWork(num_compile_threads(), "jllm-compile")
        # Touching new memory takes seconds, in which programs can be compiled.
        self._state_work = BackgroundWork(1, "jllm-state")
        self._fallbacks: set[Fallback] = set()
        self._num_compiled = self._num_loaded = 0
        self._layouts: dict[tuple[str, int], InputLayout] = {}

    @property
    def num_fallbacks(self) -> int:
        """Kernels of the accelerator that could not be used, each reason once."""
        return len(self._fallbacks)

    @property
    def num_compiled(self) -> int:
        """Programs compiled here, or found in JAX's cache after tracing."""
        return self._num_compiled

    @property
    def num_loaded(self) -> int:
        """Programs loaded from exported executables."""
        return self._num_loaded

    @property
    def token_limit(self) -> int:
        """Most tokens of a step that need not wait for a program."""
        for size in reversed(self._options.sizes.tokens):
            if self._is_ready(("prefill", size)):
                return size
        return self._first[1]

    def start(self) -> None:
        """Starts to make the first prefill program and the state."""
        self._submit(self._first)
        with self._lock:
            if self._empty is None:
                self._empty = self._state_work.submit(self._make_state)

    def compile_first(self) -> None:
        """Returns when the first prefill program can be used.

        The smallest decode follows it, since most steps are small.
        """
        self.start()
        self._submit(self._first).result()
        self._submit(("decode", self._options.sizes.rows[0]))

    def compile_rest(self) -> None:
        """Starts to compile the others in the background."""
        for key in self.all_keys():
            self._submit(key)

    def all_keys(self) -> list[tuple[str, int]]:
        """Every program that steps use, those needed soonest first."""
        sizes = self._options.sizes
        keys = [
            ("sampler", self._table_rows),
            ("prefill", sizes.tokens[0]),
            ("decode", self._table_rows),
            ("prefill", sizes.tokens[-1]),
            *(("decode", size) for size in reversed(sizes.rows)),
            *(("prefill", size) for size in sizes.tokens),
            *(("sampler", size) for size in reversed(sizes.rows[:-1])),
            ("prompt_logprobs", sizes.tokens[-1]),
            *(("pool", size) for size in sizes.tokens),
        ]
        return list(dict.fromkeys(keys))

    def wait(self) -> None:
        """Returns when every program is compiled."""
        for key in self.all_keys():
            self.get(*key)

    def init_state(self) -> EngineState:
        """The empty device state, made once."""
        self.start()
        made, self._empty = self._empty, None
        assert made is not None
        return made.result()

    def step(
        self, *, is_decode: bool, num_rows: int, num_tokens: int, has_rules: bool
    ) -> Any:
        """Layout and program of the smallest ready size that holds the step.

        Args:
            is_decode: Whether every row has one token, its last sampled one.
            num_rows: Rows of the step.
            num_tokens: Tokens of the step.
            has_rules: Whether the step's sampler program follows; a size whose sampler
                is not ready is passed over while a larger one's is.
        """
        sizes = self._options.sizes
        decodes = [("decode", n) for n in sizes.rows if is_decode and n >= num_rows]
        prefills = [("prefill", n) for n in sizes.tokens if n >= num_tokens]
        for key in (*decodes, *prefills):
            sampler = self._sampler_of(key)
            if self._is_ready(key) and (not has_rules or self._is_ready(sampler)):
                return self.named(*key)
        # Some program has to be waited for: at best only the sampler of all rows.
        ready = [key for key in prefills if self._is_ready(key)]
        return self.named(*(ready or prefills)[0])

    def get(self, kind: str, size: int) -> Compiled:
        """A program; waits until it is compiled, before all others that are not yet."""
        future = self._submit((kind, size))
        if future.done():
            return future.result()
        self._background.hasten(future)
        with self._lock:
            self._num_awaited += 1
        try:
            return future.result()
        finally:
            with self._lock:
                self._num_awaited -= 1

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for a program to be compiled."""
        return self._num_awaited > 0

    def largest_prefill(self) -> Any:
        """Layout and program of the largest prefill size."""
        return self.named("prefill", self._options.sizes.tokens[-1])

    def named(self, kind: str, size: int) -> tuple[InputLayout, Compiled]:
        """Layout and program of a step; waits for it."""
        layout = self._layouts.get((kind, size))
        if layout is None:
            layout = self._layouts[kind, size] = self._options.layout(kind, size)
        return layout, self.get(kind, size)

    def sampler(self, num_rows: int) -> Compiled:
        """The sampler program for a step of `num_rows` rows; waits for it."""
        return self.get("sampler", num_rows)

    def prompt_logprobs(self) -> Compiled:
        """The prompt log-probability program; waits for it."""
        return self.get("prompt_logprobs", self._options.sizes.tokens[-1])

    def pool(self, num_tokens: int) -> Compiled:
        """The program that sums hidden states of a prefill size; waits for it."""
        return self.get("pool", num_tokens)

    def temporary_bytes(self) -> int:
        """Scratch memory and results of the largest of some programs, per device.

        These are the first prefill, and those that look at whole rows of logits, which
        are compiled later, hence estimated.
        """
        _, program = self.named(*self._first)
        return max(
            fresh_bytes(program), sampler_bytes(self._builder.logits(self._table_rows))
        )

    def close(self) -> None:
        """Drops what is not being compiled yet, waits for the rest, frees the state."""
        self._background.close()
        self._state_work.close()
        # Its pool must be gone before another one is made in its place.
        self._empty = None

    @property
    def _table_rows(self) -> int:
        return self._options.table_rows

    def _make_state(self) -> EngineState:
        return self._build(("init_state", self._options.num_blocks))()

    def _sampler_of(self, key: tuple[str, int]) -> tuple[str, int]:
        kind, size = key
        return "sampler", size if kind == "decode" else self._table_rows

    def _is_ready(self, key: tuple[str, int]) -> bool:
        future = self._futures.get(key)
        if future is None or not future.done():
            return False
        readiness = self._readiness
        return readiness is None or readiness.is_ready(self._options.num_blocks, key)

    def _submit(self, key: tuple[str, int]) -> Future[Compiled]:
        with self._lock:
            if key not in self._futures:
                self._futures[key] = self._background.submit(partial(self._build, key))
            return self._futures[key]

    def _build(self, key: tuple[str, int]) -> Compiled:
        """Loads a program, or compiles and exports it."""
        store, num_blocks = self._store, self._options.num_blocks
        trees = self._builder.trees(key[0]) if store else None
        found = store.load(num_blocks, key, trees) if store else None
        executable = found or self._builder.build(*key)
        with self._lock:
            self._fallbacks.update(executable.fallbacks)
            self._num_loaded += found is not None
            self._num_compiled += found is None
        if store and store.fills and found is None:
            store.save(num_blocks, key, executable, trees)
        if self._readiness is not None:
            self._readiness.note_ready(num_blocks, key)
        return executable.program
