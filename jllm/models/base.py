"""What a model is: declared parameters and a pure forward function.

A family module declares every weight once as a `ParamSpec`. Loading, random
initialisation, sharding and the byte counts are all derived from that declaration.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, overload, runtime_checkable

import jax
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Float

from jllm.layers.batch import Batch
from jllm.layers.kernels import Implementation, Target, TileLayout
from jllm.models.probe import Edits


@dataclasses.dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers whose keys and values are kept for equally long.

    Attributes:
        layers: Their leaves of the KV cache.
        window: Newest positions that a token sees, itself included; None for all.
    """

    layers: tuple[int, ...]
    window: int | None


def group_layers(windows: Sequence[int | None]) -> tuple[CacheGroup, ...]:
    """The cache groups of layers with these windows.

    The first is that of the layers without a window, even if there is none: where it
    lies in the pool, the token history of a row lies too.
    """
    kinds = [None, *sorted({window for window in windows if window is not None})]
    return tuple(
        CacheGroup(tuple(i for i, own in enumerate(windows) if own == kind), kind)
        for kind in kinds
    )


Weights = Mapping[str, Any]
"""Tree of arrays with the structure of `Model.specs()`."""

KVCache = tuple[Array, ...]
"""One pool leaf `[B, 2, K, P, D]` per attention layer."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """The share of one checkpoint tensor that fills a section of a parameter.

    The tensor is transposed if need be; its rows are cut into `groups` equal runs, and
    `rows` of each run are taken.

    Attributes:
        name: Tensor name in the checkpoint.
        repeat: How often each slice along the parameter's first axis is written in
            turn; used when KV heads are replicated over devices.
        shape: Its shape in the checkpoint; None accepts any that fits the parameter.
        transposed: Whether the checkpoint has inputs first.
        groups: Runs of rows that share the tensor; more than one where it has the
            query heads, key and value of one KV head after those of another.
        rows: First row of each run and the one after the last; None for all.
    """

    name: str
    repeat: int = 1
    shape: tuple[int, ...] | None = None
    transposed: bool = False
    groups: int = 1
    rows: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ParamSpec:
    """Declaration of one parameter.

    The parameter is the concatenation of its parts along `concat_axis`, each part
    reshaped to `shape` with that one axis left to be inferred from its size. With a
    single part this is a plain reshape, usually the identity.

    Attributes:
        shape: Shape of the parameter as the model uses it.
        axes: Logical axis name of each dimension, None for an unsharded one.
        parts: Checkpoint tensors, in the order in which they are concatenated.
        concat_axis: Dimension along which the parts are concatenated.
        init: "normal" (scaled by fan-in), "ones" or "zeros"; for random weights.
        pad_axis: Dimension that may be longer than the checkpoint's; the rest is zero.
            It must be `concat_axis`.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    parts: tuple[Part, ...]
    concat_axis: int = 0
    init: str = "normal"
    pad_axis: int | None = None

    def __post_init__(self) -> None:
        """Refuses a declaration that contradicts itself."""
        if len(self.axes) != len(self.shape) or not self.shape or not self.parts:
            raise ValueError(f"shape, axes and parts do not match: {self}")
        if self.pad_axis not in (None, self.concat_axis):
            raise ValueError(f"pad_axis must be concat_axis: {self}")
        if self.init not in ("normal", "ones", "zeros"):
            raise ValueError(f"init={self.init!r} must be normal, ones or zeros")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def parameter_count(specs: Any) -> int:
    """Number of elements of all parameters of a tree, padding and repeats included."""
    return sum(spec.size for spec in jax.tree.leaves(specs))


def published_parameter_count(specs: Any) -> int:
    """Number of weights in the checkpoint, without padding, repeats and shares.

    Raises:
        ValueError: A part does not declare its shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in jax.tree.leaves(specs):
        for part in spec.parts:
            if part.shape is None:
                raise ValueError(f"part {part.name!r} declares no shape")
            shapes[part.name] = part.shape
    return sum(math.prod(shape) for shape in shapes.values())


def parameter_bytes(specs: Any, dtype: DTypeLike) -> int:
    """Bytes of all parameters of a tree, whatever the number of devices."""
    return parameter_count(specs) * np.dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class ModelOptions:
    """What the engine decides about a model, beside its config.json.

    Attributes:
        dtype: Type of weights and activations.
        kv_dtype: Type of the KV pool, None for `dtype`; "uint16" holds the bits of a
            16-bit `dtype`, which XLA's CPU backend could not update in place.
        kv_width_multiple: The heads of the KV pool are padded to a multiple of this
            width; 128 on a TPU, whose registers are that wide.
        max_model_len: Longest context; scalings of RoPE that depend on it are fixed.
        attention: Attention implementation; a forced one never falls back.
        target: Device that the kernels are made for, None for the default one.
        mesh: Devices that share each layer, None for a single one. One without
            devices does to declare weights, not to compute.
    """

    dtype: str = "float32"
    kv_dtype: str | None = None
    kv_width_multiple: int = 1
    max_model_len: int = 2048
    attention: Implementation = "auto"
    target: Target | None = None
    mesh: Mesh | AbstractMesh | None = None

    @property
    def tensor_size(self) -> int:
        """Number of devices that share each layer."""
        return 1 if self.mesh is None else self.mesh.shape["tensor"]

    @property
    def pipe_size(self) -> int:
        """Number of stages that share the stack of layers."""
        return 1 if self.mesh is None else self.mesh.shape["pipe"]


@runtime_checkable
class Model(Protocol):
    """A network: its declared weights and two pure functions over them."""

    @property
    def options(self) -> ModelOptions:
        """What the engine decided."""
        ...

    @property
    def kv_dtype(self) -> str:
        """Type of the KV pool."""
        ...

    @property
    def num_layers(self) -> int:
        """Number of leaves of the KV cache."""
        ...

    @property
    def width(self) -> int:
        """Length `E` of the hidden states."""
        ...

    @property
    def cache_groups(self) -> tuple[CacheGroup, ...]:
        """Which leaves are kept for how long, as `group_layers` gives them."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of token ids, without padding."""
        ...

    @property
    def padded_vocab_size(self) -> int:
        """Width of the logits."""
        ...

    def specs(self) -> dict[str, Any]:
        """The tree of `ParamSpec` from which weights are loaded."""
        ...

    def kv_shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """Shape `(B, 2, K, P, D)` of one layer's pool, `D` perhaps padded."""
        ...

    def tile_layout(self, block_size: int) -> TileLayout | None:
        """How `Batch.tiles` are cut; None where the batches have none."""
        ...

    def init_kv(self, num_blocks: int, block_size: int) -> KVCache:
        """An empty cache, all zeros."""
        ...

    @property
    def activations(self) -> tuple[str, ...]:
        """Names that `capture` and `edit` of `forward` can mean, in order."""
        ...

    @overload
    def forward(
        self,
        weights: Weights,
        kv: KVCache,
        batch: Batch,
        *,
        capture: None = None,
        edit: Edits | None = None,
    ) -> tuple[Float[Array, "T E"], KVCache]: ...

    @overload
    def forward(
        self,
        weights: Weights,
        kv: KVCache,
        batch: Batch,
        *,
        capture: Sequence[str],
        edit: Edits | None = None,
    ) -> tuple[Float[Array, "T E"], KVCache, dict[str, Array]]: ...

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

        With `capture` also those activations, by name; see `jllm.models.probe`.
        """
        ...

    def logits(
        self, weights: Weights, hidden: Float[Array, "N E"]
    ) -> Float[Array, "N V"]:
        """Scores of the next token in float32; padded ids are minus infinity."""
        ...
