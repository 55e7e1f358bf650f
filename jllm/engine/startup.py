"""Starts the programs of an engine, while its weights are read.

The pool is sized before anything is compiled, so that nothing is compiled twice.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jllm.config import EngineConfig, WindowPool
from jllm.distributed.leader import Leader
from jllm.engine.builder import ProgramBuilder
from jllm.engine.executables import ExecutableStore, fingerprint, folder_beside
from jllm.engine.memory import (
    MemoryBudget,
    PoolSizes,
    WindowShare,
    group_block_bytes,
    sampler_bytes,
)
from jllm.engine.options import Resolved
from jllm.engine.programs import (
    ProgramOptions,
    Programs,
    Readiness,
    describe_state,
)
from jllm.models.base import Model, ParamSpec, Weights
from jllm.models.stages import StackedSpec
from jllm.sampling.rules import RuleLayout
from jllm.weights.hub import CheckpointFiles
from shardings.place import tree_shardings

logger = logging.getLogger("jllm")

MIN_POOL_TOKENS = 65536
"""A pool is not made smaller than this only because few rows could use it."""

ACTIVATION_COPIES = 4
"""Arrays as wide as the widest layer that a prefill program may hold at once."""

LEAST_SHARE_OF_POOL = 0.75
"""A smaller pool than would fit is taken down to here, if its programs are there."""


@dataclasses.dataclass(frozen=True, slots=True)
class StartPlan:
    """What is known of a replica before its weights are read.

    Attributes:
        config: The options.
        files: The checkpoint's settings.
        resolved: What follows from both.
        model: The network.
        mesh: Devices that share each layer; one without devices does to count bytes.
        capacity: Bytes that each device can give.
        leader: The other hosts, on the first of several.
    """

    config: EngineConfig
    files: CheckpointFiles
    resolved: Resolved
    model: Model
    mesh: Mesh | AbstractMesh
    capacity: int
    leader: Leader | None = None

    @property
    def place(self) -> NamedSharding:
        """Where inputs and small results live."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def devices(self) -> list[Any]:
        """The devices of the mesh, in order."""
        assert isinstance(self.mesh, Mesh)
        return list(self.mesh.devices.flat)

    @property
    def first_tokens(self) -> int:
        """Size of the prefill program that the first token waits for.

        On a computer the smallest that can serve every row: the larger ones take as
        long to compile again, on the cores that compute, and longer to run. Elsewhere
        the largest, since the pool depends on what that needs; in a pipeline too, where
        a step must hold all that is on its way.
        """
        sizes, is_one = self.resolved.sizes, self.config.pipeline_parallel_size == 1
        if (
            self.resolved.platform != "cpu"
            or not self.config.compile_ahead
            or not is_one
        ):
            return sizes.tokens[-1]
        return next(size for size in sizes.tokens if size >= sizes.rows[-1])

    def weights(self) -> Weights:
        """Shapes, types and places of the weights."""
        specs = self.model.specs()
        return jax.tree.map(
            lambda spec, place: jax.ShapeDtypeStruct(
                spec.shape, jnp.dtype(self.resolved.dtype), sharding=place
            ),
            specs,
            tree_shardings(specs, self.mesh),
            is_leaf=_is_spec,
        )

    def budget(self, temporaries: int) -> MemoryBudget:
        """The memory of one device, given what the programs need beside the pool."""
        resolved, config = self.resolved, self.config
        blocks_per_row = -(-resolved.max_model_len // resolved.block_size)
        useful = max(
            2 * resolved.max_num_seqs * blocks_per_row,
            MIN_POOL_TOKENS // resolved.block_size,
        )
        return MemoryBudget(
            capacity=self.capacity,
            utilization=resolved.utilization,
            weights=_bytes_per_device(
                (self.weights(), self._in_stages(blocks_per_row))
            ),
            temporaries=temporaries,
            block=group_block_bytes(self.model, resolved.block_size)[0],
            most_useful_blocks=config.num_blocks or useful,
            windows=window_shares(resolved, self.model),
        )

    def _in_stages(self, blocks_per_row: int) -> object:
        """What the device state holds of a pipeline's microbatches."""
        if self.model.options.pipe_size == 1:
            return ()
        options = program_options(self.resolved, self.model, blocks_per_row)
        return describe_state(self.model, options, self.place).flights

    def builder(self, num_blocks: int, *, use_cache: bool = True) -> ProgramBuilder:
        """Compiles the programs for a pool.

        Args:
            num_blocks: Blocks of the pool.
            use_cache: Whether programs may come from JAX's cache.
        """
        options = program_options(self.resolved, self.model, num_blocks)
        return ProgramBuilder(
            self.model, options, self.weights(), self.place, use_cache=use_cache
        )

    def expected_temporaries(self) -> int:
        """What the largest program will need, generously.

        A few arrays of activations as wide as the widest layer, or of logits.
        """
        layers = [
            spec
            for spec in jax.tree.leaves(self.model.specs(), is_leaf=_is_spec)
            if "vocab" not in spec.axes
        ]
        widest = max(spec.size // spec.shape[-1] for spec in layers)
        activations = ACTIVATION_COPIES * 4 * self.resolved.token_budget * widest
        logits = self.builder(1).logits(self.resolved.sizes.rows[-1])
        # What is stacked over stages is divided among them.
        sharing = self.mesh.shape["tensor"] * self.mesh.shape["pipe"]
        return max(activations // sharing, sampler_bytes(logits))

    def fingerprint(self) -> str:
        """Names all that the programs depend on but the pool."""
        facts = (
            json.dumps(dict(self.files.config), sort_keys=True),
            dataclasses.replace(self.model.options, mesh=None),
            self.mesh.shape_tuple,
            program_options(self.resolved, self.model, 1),
            self.resolved.max_model_len,
            [str(leaf) for leaf in jax.tree.leaves(self.weights())],
        )
        return fingerprint(self.devices, *facts)

    def store(self, name: str) -> ExecutableStore | None:
        """Where executables are loaded from and perhaps exported to, if anywhere."""
        folder, config = self.config.executables, self.config
        # A file can tell neither what other hosts have, nor what a function is.
        if folder is None or self.leader is not None or config.logits_processors:
            return None
        if folder == "auto":
            beside = folder_beside(self.files.path)
            return ExecutableStore.found(beside, name, self.devices)
        return ExecutableStore(folder, name, self.devices)

    def pool_sizes(self, name: str) -> PoolSizes | None:
        """The pools that programs in JAX's cache were compiled for, if it has one."""
        folder = compilation_cache()
        return None if folder is None else PoolSizes(folder / "pools" / name)

    def choose_blocks(
        self, store: ExecutableStore | None, pools: PoolSizes | None, temporaries: int
    ) -> int:
        """Size of the pool: as asked for, else what will fit.

        A size that was compiled for before is preferred, unless it wastes much: what is
        free on a computer differs from start to start, and programs fit one pool only.
        For the same reason a new size leaves a sixteenth of a computer's share unused.
        """
        if self.config.num_blocks is not None:
            return self.config.num_blocks
        budget = self.budget(temporaries)
        most = budget.require(1)
        known = (*(store.pools() if store else ()), *(pools.read() if pools else ()))
        known = [n for n in known if n <= most]
        if known and max(known) >= LEAST_SHARE_OF_POOL * most:
            return max(known)
        is_whole = most == budget.most_useful_blocks or self.resolved.platform != "cpu"
        return most if is_whole else most - most // 16

    def start(self, temporaries: int | None = None) -> "Compiling":
        """Starts to compile for the pool that will fit.

        Args:
            temporaries: What the largest program needs; None where it is not known yet.
        """
        if temporaries is None:
            temporaries = self.expected_temporaries()
        name = self.fingerprint()
        store, pools = self.store(name), self.pool_sizes(name)
        num_blocks = self.choose_blocks(store, pools, temporaries)
        if pools and self.config.num_blocks is None:
            pools.add(num_blocks)
        if self.leader is not None:
            self.leader.announce_pool(num_blocks)
        return self.compile(num_blocks, store, self.leader)

    def compile(
        self,
        num_blocks: int,
        store: ExecutableStore | None = None,
        readiness: Readiness | None = None,
    ) -> "Compiling":
        """Starts to compile for a pool.

        Args:
            num_blocks: Its size.
            store: Where executables are exported to, if they are.
            readiness: What the other hosts have, where there are some.
        """
        options = program_options(self.resolved, self.model, num_blocks)
        fills = store is not None and store.fills
        builder = self.builder(num_blocks, use_cache=not fills)
        programs = Programs(builder, options, store, readiness, self.first_tokens)
        programs.start()
        return Compiling(options, programs)


@dataclasses.dataclass(frozen=True, slots=True)
class Compiling:
    """Programs on their way.

    Attributes:
        options: Their sizes.
        programs: The programs.
    """

    options: ProgramOptions
    programs: Programs


def programs_that_fit(plan: StartPlan, compiling: Compiling) -> Compiling:
    """Waits for the programs to be able to serve; compiles again if they need more.

    What a program needs beside the pool does not depend on the pool's size.
    """
    config = plan.config
    compiling.programs.compile_first()
    num_blocks = compiling.options.num_blocks
    temporaries = compiling.programs.temporary_bytes()
    if plan.first_tokens < plan.resolved.sizes.tokens[-1]:
        # What the largest needs is not known yet.
        temporaries = max(temporaries, plan.expected_temporaries())
    budget = plan.budget(temporaries)
    if config.num_blocks is None and budget.require(1) < num_blocks:
        compiling.programs.close()
        compiling = plan.start(budget.temporaries)
        num_blocks = compiling.options.num_blocks
        try:
            compiling.programs.compile_first()
        except BaseException:
            # The caller knows only those that were closed above.
            compiling.programs.close()
            raise
    block_size = plan.resolved.block_size
    logger.info(
        "KV pool: %.2f GiB, %d blocks of %d tokens, %d tokens in all%s; "
        "weights %.2f GiB, temporaries %.2f GiB per device",
        budget.pool_bytes(num_blocks) / 2**30,
        num_blocks,
        block_size,
        num_blocks * block_size,
        describe_windows(compiling.options.window_pools),
        budget.weights / 2**30,
        budget.temporaries / 2**30,
    )
    if config.compile_ahead:
        compiling.programs.compile_rest()
    return compiling


def compilation_cache() -> Path | None:
    """Folder of JAX's cache of compiled programs, if it has one."""
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    return None if folder is None else Path(folder)


def program_options(
    resolved: Resolved, model: Model, num_blocks: int
) -> ProgramOptions:
    """Sizes of the programs for a pool."""
    block_size = resolved.block_size
    max_len = min(resolved.max_model_len, num_blocks * block_size)
    max_blocks = -(-max_len // block_size)
    new_blocks = -(-resolved.token_budget // block_size)
    rule_layout = RuleLayout(model.padded_vocab_size)
    platform = resolved.platform
    return ProgramOptions(
        sizes=resolved.sizes,
        num_blocks=num_blocks,
        block_size=block_size,
        max_blocks=max_blocks,
        # Room for one row's whole table, beside what the other rows' tokens need.
        max_appends=max_blocks + new_blocks + resolved.max_num_seqs,
        max_copies=min(8, resolved.max_num_seqs),
        num_logprobs=resolved.max_logprobs,
        rule_size=rule_layout.size,
        draw_method="inverse_cdf" if platform == "cpu" else "gumbel",
        tiles=model.tile_layout(block_size),
        branches=platform == "cpu",
        window_pools=tuple(
            WindowPool(share.window, share.num_blocks(num_blocks))
            for share in window_shares(resolved, model)
        ),
        processors=resolved.processors,
    )


def window_shares(resolved: Resolved, model: Model) -> tuple[WindowShare, ...]:
    """What each cache group with a window needs of the memory."""
    size, block_bytes = (
        resolved.block_size,
        group_block_bytes(model, resolved.block_size),
    )
    blocks_per_row = -(-resolved.max_model_len // size)
    shares: list[WindowShare] = []
    for group, num_bytes in zip(model.cache_groups, block_bytes, strict=True):
        if group.window is None:
            continue
        # Two steps may be under way, and one more for each stage of a pipeline beyond
        # the first. Beside them each row has its window, a block for where it begins,
        # and one that goes back when the next is full.
        per_row = min(-(-group.window // size) + 2, blocks_per_row)
        num_steps = model.options.pipe_size + 1
        under_way = num_steps * -(-resolved.token_budget // size)
        shares.append(
            WindowShare(
                window=group.window,
                block=num_bytes,
                held=resolved.max_num_seqs * per_row + under_way,
            )
        )
    return tuple(shares)


def describe_windows(pools: Sequence[WindowPool]) -> str:
    """The pools of the groups with a window, for a line of the log."""
    return "".join(
        f", {pool.num_blocks} blocks for windows of {pool.window}" for pool in pools
    )


def _is_spec(node: object) -> bool:
    return isinstance(node, (ParamSpec, StackedSpec))


def _bytes_per_device(tree: object) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
