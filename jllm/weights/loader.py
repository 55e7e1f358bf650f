"""Streams a checkpoint onto its devices, one parameter at a time.

Every device's slice is filled straight from the memory-mapped files, parts in place, so
that the host needs at most one parameter more than the arrays themselves.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding
from jax.typing import DTypeLike
from tqdm import tqdm

from jllm.errors import CheckpointError
from jllm.models.base import ParamSpec, Part, parameter_bytes
from jllm.models.stages import StackedSpec
from jllm.weights.formats import checkpoint_tensors
from jllm.weights.host_memory import HostMemory
from jllm.weights.hub import CheckpointFiles
from jllm.weights.lazy import CheckpointTensor, Readable
from jllm.weights.parts import fitted_shape, part_view

NEVER_USED = (
    "rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
"""Tensors that old checkpoints hold, but that follow from config.json: frequencies and
the causal mask."""

BASE_PREFIXES = ("model.", "transformer.", "gpt_neox.")
"""What names begin with, except in a checkpoint saved without the output head."""

Bounds = tuple[tuple[int, int], ...]
"""First place and place after the last, of each dimension."""


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """The share of one checkpoint tensor in a parameter.

    Attributes:
        tensor: The tensor.
        part: What of the tensor is taken.
        shape: Shape of that, made to fit the parameter's dimensions.
        start: Its first place along the parameter's `concat_axis`.
    """

    tensor: CheckpointTensor
    part: Part
    shape: tuple[int, ...]
    start: int

    @property
    def repeat(self) -> int:
        """How often each of its slices along the first axis is written."""
        return self.part.repeat

    def length(self, axis: int) -> int:
        """Places it takes along a dimension of the parameter."""
        return self.shape[axis] * (self.repeat if axis == 0 else 1)

    def view(self, stored: Readable) -> Readable:
        """The share of an array of the tensor's shape; see `part_view`."""
        return part_view(self.part, self.shape, stored)


def load_weights(
    files: CheckpointFiles,
    specs: Mapping[str, Any],
    shardings: Mapping[str, Any],
    dtype: DTypeLike,
    *,
    ignore: tuple[str, ...] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Loads a checkpoint.

    Args:
        files: The checkpoint.
        specs: Tree of `ParamSpec`.
        shardings: The same tree of shardings.
        dtype: Type of the arrays; values are rounded to it.
        ignore: Endings of tensor names that may be left over, beside `NEVER_USED`.
        progress: Whether to show a bar on stderr, where that is a terminal.

    Returns:
        The same tree of arrays, each on its devices.

    Raises:
        CheckpointError: A file or tensor is missing, damaged, left over, or does not
            match its parameter; found before anything is read, except for values that
            `dtype` cannot hold.
    """
    tensors = checkpoint_tensors(files)
    layout = _lay_out_tree(specs, tensors)
    _refuse_leftovers(layout, tensors, (*NEVER_USED, *ignore))
    total = parameter_bytes(specs, dtype)
    memory = memory_for(shardings, total)
    with tqdm(
        desc="Loading weights",
        total=total,
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
    ) as bar:

        def load(
            spec: ParamSpec | StackedSpec, sections: Any, sharding: Sharding
        ) -> Array:
            array = _load_parameter(spec, sections, sharding, np.dtype(dtype), memory)
            bar.update(array.nbytes)
            return array

        return jax.tree.map(load, specs, layout, shardings)


def used_tensors(
    files: CheckpointFiles, specs: Mapping[str, Any], *, ignore: tuple[str, ...] = ()
) -> dict[str, CheckpointTensor]:
    """The tensors that parameters are made of, checked as `load_weights` does it."""
    tensors = checkpoint_tensors(files)
    layout = _lay_out_tree(specs, tensors)
    _refuse_leftovers(layout, tensors, (*NEVER_USED, *ignore))
    return {section.tensor.name: section.tensor for section in jax.tree.leaves(layout)}


def memory_for(shardings: Mapping[str, Any], capacity: int) -> HostMemory:
    """Where slices are put together: for a CPU, memory that it then computes with."""
    (device, *_) = jax.tree.leaves(shardings)[0].device_set
    return HostMemory(capacity if device.platform == "cpu" else 0)


def lay_out(
    name: str, spec: ParamSpec, tensors: Mapping[str, CheckpointTensor]
) -> tuple[Section, ...]:
    """Finds the tensors of a parameter and checks that they fill it.

    Args:
        name: The parameter, for messages.
        spec: Its declaration.
        tensors: What the checkpoint holds.

    Raises:
        CheckpointError: A tensor is missing, or has another type or shape.
    """
    sections: list[Section] = []
    start, axis = 0, spec.concat_axis
    for part in spec.parts:
        tensor = _named(part.name, tensors)
        if tensor is None:
            raise CheckpointError(
                f"tensor {part.name!r} is missing from the checkpoint; parameter "
                f"{name} of shape {spec.shape} needs it"
            )
        tensor.check_readable()
        shape = fitted_shape(spec, part, tensor.shape)
        if shape is None:
            raise _misshapen(name, spec, [part], [tensor])
        section = Section(tensor, part, shape, start)
        sections.append(section)
        start += section.length(axis)
    room = spec.shape[axis] - start
    if room < 0 or (room and spec.pad_axis is None):
        raise _misshapen(name, spec, spec.parts, [s.tensor for s in sections])
    return tuple(sections)


def read_slice(
    spec: ParamSpec,
    sections: tuple[Section, ...],
    bounds: Bounds,
    dtype: np.dtype[Any],
    memory: HostMemory,
) -> np.ndarray:
    """Reads one rectangular slice of a parameter into a new buffer.

    Raises:
        CheckpointError: A finite value that `dtype` cannot hold.
    """
    shape = tuple(stop - start for start, stop in bounds)
    buffer = memory.empty(shape, dtype)
    if spec.pad_axis is not None:
        buffer[...] = 0
    for section in sections:
        try:
            with np.errstate(over="raise"):
                _fill(buffer, bounds, section, spec.concat_axis)
        except FloatingPointError:
            tensor = section.tensor
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} has values that {dtype} cannot "
                f"hold; choose another dtype"
            ) from None
    return buffer


def _fill(buffer: np.ndarray, bounds: Bounds, section: Section, axis: int) -> None:
    """Copies what a section shares with the slice at `bounds` into the buffer."""
    low, high = bounds[axis]
    first = max(low, section.start)
    last = min(high, section.start + section.length(axis))
    if first >= last:
        return
    wanted = [slice(*pair) for pair in bounds]
    wanted[axis] = slice(first - section.start, last - section.start)
    source = section.view(section.tensor.map())
    target = np.moveaxis(buffer, axis, 0)[first - low : last - low]
    target = np.moveaxis(target, 0, axis)
    if section.repeat == source.shape[1] == 1:
        target[...] = source[(wanted[0], 0, *wanted[1:])]
        return
    # Few rows: the first axis is that of the KV heads.
    for place, row in enumerate(range(wanted[0].start, wanted[0].stop)):
        places = divmod(row // section.repeat, source.shape[1])
        target[place] = source[(*places, *wanted[1:])]


def _read_stages(
    spec: StackedSpec,
    sections: tuple[tuple[Section, ...], ...],
    bounds: Bounds,
    dtype: np.dtype[Any],
    memory: HostMemory,
) -> np.ndarray:
    """Reads a slice of stacked parameters; a device mostly has one of them."""
    stages, *inner = bounds
    parts = [
        read_slice(spec.members[i], sections[i], tuple(inner), dtype, memory)
        for i in range(*stages)
    ]
    return parts[0][None] if len(parts) == 1 else np.stack(parts)


def _load_parameter(
    spec: ParamSpec | StackedSpec,
    sections: Any,
    sharding: Sharding,
    dtype: np.dtype[Any],
    memory: HostMemory,
) -> Array:
    slices: dict[Bounds, np.ndarray] = {}

    def read(index: Any) -> np.ndarray:
        bounds = tuple(
            entry.indices(size)[:2]
            for entry, size in zip(index, spec.shape, strict=True)
        )
        if bounds not in slices:
            if isinstance(spec, StackedSpec):
                found = _read_stages(spec, sections, bounds, dtype, memory)
            else:
                found = read_slice(spec, sections, bounds, dtype, memory)
            slices[bounds] = found
        return slices[bounds]

    array = jax.make_array_from_callback(spec.shape, sharding, read)
    # The buffers must be free before the next parameter's are made.
    return jax.block_until_ready(array)


def _lay_out_tree(
    specs: Mapping[str, Any], tensors: Mapping[str, CheckpointTensor]
) -> Any:
    def one(path: Any, spec: ParamSpec | StackedSpec) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if isinstance(spec, StackedSpec):
            return tuple(lay_out(name, member, tensors) for member in spec.members)
        return lay_out(name, spec, tensors)

    return jax.tree_util.tree_map_with_path(one, specs)


def _named(
    name: str, tensors: Mapping[str, CheckpointTensor]
) -> CheckpointTensor | None:
    """The tensor of that name, or without the prefix of the network's body."""
    for prefix in BASE_PREFIXES:
        if name not in tensors and name.startswith(prefix):
            return tensors.get(name.removeprefix(prefix))
    return tensors.get(name)


def _misshapen(
    name: str,
    spec: ParamSpec,
    parts: Sequence[Part],
    tensors: Sequence[CheckpointTensor],
) -> CheckpointError:
    """The error for tensors that do not fill a parameter, alone or together."""
    found = ", ".join(
        f"tensor {tensor.name!r} has shape {tensor.shape}"
        + (
            f" instead of {part.shape}"
            if part.shape not in (None, tensor.shape)
            else ""
        )
        for part, tensor in zip(parts, tensors, strict=True)
    )
    return CheckpointError(
        f"{tensors[0].file}: {found}, which does not fit parameter {name} of shape "
        f"{spec.shape}"
    )


def _refuse_leftovers(
    layout: Any, tensors: Mapping[str, CheckpointTensor], ignore: tuple[str, ...]
) -> None:
    used = {section.tensor.name for section in jax.tree.leaves(layout)}
    for name, tensor in tensors.items():
        if name not in used and not name.endswith(ignore):
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} of shape {tensor.shape} belongs to no "
                f"parameter of the model"
            )
