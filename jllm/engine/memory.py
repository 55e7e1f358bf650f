"""How many KV blocks fit: one formula over what the compiler and the device report."""

import bisect
import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import psutil
from jax.sharding import Mesh

from jllm.errors import ConfigError
from jllm.models.base import Model
from jllm.sampling.logprobs import PROMPT_CHUNK

CACHED_SHARE = 8
"""Of so many blocks of the whole context, one block of each window is for prefixes."""


@dataclasses.dataclass(frozen=True, slots=True)
class WindowShare:
    """What a cache group with a window takes of the memory.

    Running sequences hold no more than their windows there; a found prefix needs one
    window, however long it is. Hence it gets what all rows can hold, and beside that
    a share of the size of the other pool.

    Attributes:
        window: Newest positions that a token sees.
        block: Bytes of one block of all its layers.
        held: Most blocks that running sequences use.
    """

    window: int
    block: int
    held: int

    def num_blocks(self, num_full: int) -> int:
        """Blocks beside so many that hold the whole context; no more than those."""
        return min(num_full, self.held + num_full // CACHED_SHARE)


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes on one device.

    Attributes:
        capacity: Memory that could be used before the weights were loaded.
        utilization: Share of it that may be used.
        weights: Weights on this device, and microbatches on their way.
        temporaries: Largest scratch memory of any program, and its results.
        block: One block of the pools of all layers that keep the whole context, and of
            the token history.
        most_useful_blocks: Blocks beyond which none could be used.
        windows: What the other layers take beside those blocks.
    """

    capacity: int
    utilization: float
    weights: int
    temporaries: int
    block: int
    most_useful_blocks: int
    windows: tuple[WindowShare, ...] = ()

    def pool_bytes(self, num_blocks: int) -> int:
        """Bytes of all pools, if so many blocks hold the whole context."""
        others = (share.block * share.num_blocks(num_blocks) for share in self.windows)
        return num_blocks * self.block + sum(others)

    @property
    def num_blocks(self) -> int:
        """Blocks that fit: what weights and temporaries leave of the share."""
        free = self.capacity * self.utilization - self.weights - self.temporaries
        sizes = range(self.most_useful_blocks + 1)
        return max(0, bisect.bisect_right(sizes, free, key=self.pool_bytes) - 1)

    def require(self, num_blocks: int) -> int:
        """The blocks that fit, at least `num_blocks`.

        Raises:
            ConfigError: Fewer fit; names the sizes.
        """
        if self.num_blocks < num_blocks:
            gib = 2**30
            raise ConfigError(
                f"memory_utilization={self.utilization} of "
                f"{self.capacity / gib:.2f} GiB leaves {self.num_blocks} KV blocks "
                f"beside {self.weights / gib:.2f} GiB of weights and "
                f"{self.temporaries / gib:.2f} GiB of temporaries, but the smallest "
                f"pool has {num_blocks}"
            )
        return self.num_blocks


def group_block_bytes(model: Model, block_size: int) -> tuple[int, ...]:
    """Bytes of one block of each cache group on one device.

    That of the first group has a place in the token history beside the pools.
    """
    elements = math.prod(model.kv_shape(1, block_size))
    itemsize = jnp.dtype(model.kv_dtype).itemsize
    layer = elements * itemsize // model.options.tensor_size
    full, *others = (layer * len(group.layers) for group in model.cache_groups)
    return (full + 4 * block_size, *others)


class PoolSizes:
    """The sizes, in blocks, for which programs were compiled before: one small file.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        """Reads nothing yet."""
        self._path = path

    def read(self) -> tuple[int, ...]:
        """The sizes; none where the file cannot be read."""
        try:
            words = self._path.read_text().split()
        except (OSError, UnicodeDecodeError):
            return ()
        return tuple(int(word) for word in words if word.isdecimal())

    def add(self, num_blocks: int) -> None:
        """Adds a size; a folder that cannot be written to is left alone."""
        if num_blocks in self.read():
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(f"{num_blocks}\n")


def device_capacity(mesh: Mesh) -> int:
    """Bytes of memory that a device of the mesh can still give to this process."""
    device = mesh.local_devices[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return psutil.virtual_memory().available


def default_utilization(platform: str) -> float:
    """Nearly all of an accelerator, but not of a computer that others use too."""
    return 0.3 if platform == "cpu" else 0.9


LOGITS_COPIES = 6
"""Arrays of the size of the logits that the sampler programs hold at once, at most."""


def sampler_bytes(logits: Any) -> int:
    """Most scratch memory of the programs that look at whole rows of logits."""
    num_rows, width = logits.sharding.shard_shape(logits.shape)
    return LOGITS_COPIES * 4 * (num_rows + PROMPT_CHUNK) * width


def fresh_bytes(program: Any) -> int:
    """Scratch memory of a program and its results that replace no argument."""
    analysis = program.memory_analysis()
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.temp_size_in_bytes + max(0, fresh)
