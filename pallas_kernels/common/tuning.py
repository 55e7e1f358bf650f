"""Tile sizes found by measurement, stored as data beside each operation."""

import contextlib
import contextvars
import dataclasses
import functools
import json
import pathlib
from collections.abc import Generator, Mapping

from pallas_kernels.common.target import Target

FOLDER = pathlib.Path(__file__).parents[1]

Sizes = Mapping[str, int]


@dataclasses.dataclass(slots=True)
class Trial:
    """Sizes under trial, and what the kernels traced meanwhile have asked for.

    Attributes:
        sizes: Sizes to use, by folder and key.
        asked: Sizes used, by folder and key.
    """

    sizes: Mapping[tuple[str, str], Sizes]
    asked: dict[tuple[str, str], Sizes] = dataclasses.field(default_factory=dict)


_trial: contextvars.ContextVar[Trial | None] = contextvars.ContextVar(
    "trial", default=None
)


@contextlib.contextmanager
def try_sizes(sizes: Mapping[tuple[str, str], Sizes]) -> Generator[Trial]:
    """Kernels traced in this context use these sizes in place of the stored ones."""
    trial = Trial(sizes)
    token = _trial.set(trial)
    try:
        yield trial
    finally:
        _trial.reset(token)


def tuned_sizes(folder: str, target: Target, key: str, default: Sizes) -> Sizes:
    """Sizes measured as the best for a kernel and shape, else the default.

    Args:
        folder: Folder of the operation.
        target: Device; its name selects the file `tuning/<name>.json`.
        key: Names kernel, types and shape class; each operation says how.
        default: Sizes where nothing was measured.
    """
    sizes = {**default, **_read(folder, target.name).get(key, {})}
    trial = _trial.get()
    if trial is not None:
        sizes |= trial.sizes.get((folder, key), {})
        trial.asked[folder, key] = sizes
    return sizes


def store_sizes(folder: str, device: str, key: str, sizes: Sizes) -> None:
    """Files sizes under a device; kernels traced from now on use them."""
    path = FOLDER / folder / "tuning" / f"{device}.json"
    path.parent.mkdir(exist_ok=True)
    stored = {**_read(folder, device), key: dict(sizes)}
    path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", "utf-8")
    _read.cache_clear()


@functools.cache
def _read(folder: str, device: str) -> Mapping[str, Sizes]:
    path = FOLDER / folder / "tuning" / f"{device}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
