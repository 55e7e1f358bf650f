"""Arrays of which only the part that is asked for is read."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jllm.errors import CheckpointError

Box = tuple[tuple[int, int], ...]
"""First place and place after the last, of each dimension."""

STORED_DTYPES = ("F32", "F16", "BF16")
"""Types that weights may be stored in, as safetensors spells them."""


class Readable(Protocol):
    """What loading asks of an array, be it mapped into memory or read piecemeal."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    def reshape(self, shape: tuple[int, ...], /) -> Any:
        """The same elements in another shape."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """A part of it."""
        ...


class CheckpointTensor(Protocol):
    """A tensor of a checkpoint, under its Hugging Face name, in any file format."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def file(self) -> Path:
        """File or folder that holds it, for messages."""
        ...

    @property
    def dtype(self) -> str:
        """Type of the elements that `map` gives, one of `STORED_DTYPES`."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    def check_readable(self) -> None:
        """Raises `CheckpointError` if it holds no weights."""
        ...

    def map(self) -> Readable:
        """Its elements; only what is used is read."""
        ...


class LazyArray:
    """An array read box by box, seen in any shape that splits or merges dimensions.

    An index reads the smallest box of the source that covers it: exactly what was asked
    for where the two shapes agree, or where the part is a run of the dimensions that
    were split or merged.

    Args:
        source_shape: Shape of what is read from.
        read: Reads a box of the source into an array of the box's shape.
        shape: Shape as seen; None for that of the source.
    """

    def __init__(
        self,
        source_shape: Sequence[int],
        read: Callable[[Box], np.ndarray],
        shape: Sequence[int] | None = None,
    ) -> None:
        """Reads nothing yet."""
        self._source = tuple(source_shape)
        self._read = read
        self.shape = self._source if shape is None else tuple(shape)
        if math.prod(self.shape) != math.prod(self._source):
            raise ValueError(f"{self._source} has no shape {self.shape}")

    @property
    def T(self) -> "LazyArray":  # noqa: N802
        """The same elements with the dimensions in opposite order."""
        return LazyArray(self.shape[::-1], lambda box: self._read_box(box[::-1]).T)

    def reshape(self, *shape: Any) -> "LazyArray":
        """The same elements in another shape, given as numpy takes it."""
        sizes = list(shape[0] if isinstance(shape[0], Sequence) else shape)
        if -1 in sizes:
            known = -math.prod(sizes)
            sizes[sizes.index(-1)] = math.prod(self.shape) // max(known, 1)
        return LazyArray(self._source, self._read, sizes)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads a part, given by integers and by slices without steps."""
        entries = index if isinstance(index, tuple) else (index,)
        entries += (slice(None),) * (len(self.shape) - len(entries))
        box = tuple(
            entry.indices(size)[:2]
            if isinstance(entry, slice)
            else (int(entry), int(entry) + 1)
            for entry, size in zip(entries, self.shape, strict=True)
        )
        kept = [
            stop - start
            for (start, stop), entry in zip(box, entries, strict=True)
            if isinstance(entry, slice)
        ]
        return self._read_box(box).reshape(kept)

    def __array__(self, dtype: Any = None, *, copy: bool | None = None) -> np.ndarray:
        """All of it."""
        del copy  # what is read is always new
        array = self[()]
        return array if dtype is None else array.astype(dtype)

    def _read_box(self, box: Box) -> np.ndarray:
        if any(start >= stop for start, stop in box):
            empty = self._read(((0, 0),) * len(self._source))
            return np.zeros([max(stop - start, 0) for start, stop in box], empty.dtype)
        wanted: list[tuple[tuple[int, ...], tuple[int, ...], Box]] = []
        for source, seen in _groups(self._source, self.shape):
            wanted.append((self._source[source], self.shape[seen], box[seen]))
        covers = [_cover(source, _places(seen, part)) for source, seen, part in wanted]
        array = self._read(tuple(pair for cover in covers for pair in cover))
        array = array.reshape([math.prod(b - a for a, b in cover) for cover in covers])
        for axis, ((source, seen, part), cover) in enumerate(
            zip(wanted, covers, strict=True)
        ):
            places = _places(seen, part) - _first_place(source, cover)
            first, last = int(places[0]), int(places[-1])
            if last - first + 1 == places.size:
                keep = (slice(None),) * axis + (slice(first, last + 1),)
                array = array[keep]
            else:
                array = array.take(places, axis)
        return array.reshape([stop - start for start, stop in box])


@dataclasses.dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor of a checkpoint that is decoded when it is used.

    Attributes:
        name: Its Hugging Face name.
        file: File or folder that holds it.
        dtype: Type of its elements once decoded, as safetensors spells it.
        array: Its elements.
    """

    name: str
    file: Path
    dtype: str
    array: LazyArray

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.array.shape

    def check_readable(self) -> None:
        """Checks the type.

        Raises:
            CheckpointError: Not a type for weights.
        """
        if self.dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} has type {self.dtype}, but weights "
                f"must be one of {', '.join(STORED_DTYPES)}"
            )

    def map(self) -> LazyArray:
        """Its elements; only what is used is read."""
        return self.array


def _groups(
    source: tuple[int, ...], seen: tuple[int, ...]
) -> list[tuple[slice, slice]]:
    """Smallest runs of neighbouring dimensions of two shapes with equal products."""
    groups: list[tuple[slice, slice]] = []
    i = j = 0
    while i < len(source) or j < len(seen):
        first = (i, j)
        products = [1, 1]
        if i < len(source):
            products[0], i = source[i], i + 1
        if j < len(seen):
            products[1], j = seen[j], j + 1
        while products[0] != products[1]:
            if products[0] < products[1]:
                products[0], i = products[0] * source[i], i + 1
            else:
                products[1], j = products[1] * seen[j], j + 1
        groups.append((slice(first[0], i), slice(first[1], j)))
    return groups


def _places(shape: tuple[int, ...], box: Box) -> np.ndarray:
    """Flat places of the elements of a box, ascending."""
    places = np.zeros(1, np.int64)
    for size, (start, stop) in zip(shape, box, strict=True):
        places = (places[:, None] * size + np.arange(start, stop)).ravel()
    return places


def _cover(shape: tuple[int, ...], places: np.ndarray) -> Box:
    """Smallest box that is one run of flat places and holds all of the given ones."""
    low, high = int(places[0]), int(places[-1])
    box: list[tuple[int, int]] = []
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :])
        first, last = low // stride, high // stride
        box.append((first, last + 1))
        if first != last:
            return (*box, *((0, size) for size in shape[axis + 1 :]))
        low, high = low - first * stride, high - first * stride
    return tuple(box)


def _first_place(shape: tuple[int, ...], box: Box) -> int:
    place = 0
    for size, (start, _) in zip(shape, box, strict=True):
        place = place * size + start
    return place
