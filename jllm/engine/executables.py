"""Exported executables: compiled programs on disk, loaded without tracing or compiling.

JAX unpickles what is loaded, which runs any code that a file holds: only folders and
files of the user's own, which nobody else may write to, are read.
"""

import dataclasses
import hashlib
import json
import logging
import os
import platform
import stat
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jaxlib import xla_client

from jllm.errors import ConfigError
from jllm.layers.kernels import Fallback

logger = logging.getLogger("jllm")

SOURCES = (
    "jllm/engine",
    "jllm/layers",
    "jllm/models",
    "jllm/quantization",
    "jllm/sampling",
    "pallas_kernels",
    "shardings",
)
"""Folders whose code, or tuning tables, shape the programs."""

TRACING_OPTIONS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_threefry_partitionable",
)
"""JAX options that change what is traced."""


@dataclasses.dataclass(frozen=True, slots=True)
class Executable:
    """A compiled program and what was learnt while it was traced.

    Attributes:
        program: Called with the arrays it was compiled for.
        fallbacks: Kernels that could not be used in it.
    """

    program: Any
    fallbacks: frozenset[Fallback]


def fingerprint(devices: Sequence[Any], *facts: object) -> str:
    """Names everything that a program depends on, beside its own size.

    Args:
        devices: Devices that it is compiled for, in their order.
        *facts: Configuration, shapes and layouts; their `repr` must be the same in
            every process.
    """
    client = devices[0].client
    parts = [
        jax.__version__,
        metadata.version("jaxlib"),
        client.platform,
        client.platform_version,
        jax.process_index(),
        jax.process_count(),
        [(device.id, device.device_kind) for device in devices],
        _processor() if client.platform == "cpu" else "",
        _libtpu_flags() if client.platform == "tpu" else "",
        [(name, getattr(jax.config, name)) for name in TRACING_OPTIONS],
        # These hold the flags of XLA.
        xla_client.CompileOptions().SerializeAsString(),
        _sources(),
        *facts,
    ]
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:32]


def _libtpu_flags() -> str:
    """Flags of the TPU's compiler, which libtpu takes from here and tells nobody."""
    return os.environ.get("LIBTPU_INIT_ARGS", "")  # noqa: TID251


def _processor() -> str:
    """What machine code depends on: the processor, its features, and the threads.

    XLA cuts the work of an operation into as many parts as there are threads.
    """
    threads = f"{_num_threads()} threads"
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.machine()} {platform.processor()} {threads}"
    first = cpuinfo.read_text().partition("\n\n")[0].splitlines()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join([*(line for line in first if line.startswith(kept)), threads])


def _num_threads() -> int:
    """Processors that the process may use, which is how many threads XLA starts."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _sources() -> str:
    """A digest of the code that programs are made from."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def folder_beside(model: Path) -> Path:
    """Where `jllm compile` leaves executables, and a start looks for them.

    Args:
        model: Folder or file of the checkpoint.
    """
    return (model if model.is_dir() else model.parent) / "executables"


class ExecutableStore:
    """The executables of one model on one machine, in a folder per size of the pool.

    Args:
        folder: Made if missing; must belong to the user.
        name: Fingerprint of everything but the pool.
        devices: Devices that run the programs.
        fills: Whether programs that are not there are to be written.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        devices: Sequence[Any],
        *,
        fills: bool = True,
    ) -> None:
        """Makes the folder.

        Raises:
            ConfigError: It cannot be made, or others can write to it.
        """
        self._folder = Path(folder).expanduser() / name
        self._devices = list(devices)
        self.fills = fills
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"executables={str(folder)!r} cannot be used: {error}"
            ) from error
        for path in (self._folder.parent, self._folder):
            if not _is_ours(path):
                raise ConfigError(
                    f"executables={str(folder)!r}: {path} must belong to the user and "
                    "be writable by nobody else, since its files are run"
                )

    @classmethod
    def found(
        cls, folder: Path, name: str, devices: Sequence[Any]
    ) -> "ExecutableStore | None":
        """The executables in a folder, to be read only; None if there are none.

        Nor are there any for a user who does not own the folder alone: that is logged.
        """
        try:
            if not (folder / name).is_dir():
                return None
            return cls(folder, name, devices, fills=False)
        except (OSError, ConfigError) as error:
            logger.warning("programs are compiled, not loaded: %s", error)
            return None

    @property
    def folder(self) -> Path:
        """Where the files are, in a folder per pool."""
        return self._folder

    def pools(self) -> tuple[int, ...]:
        """Pool sizes, in blocks, of which there are executables; ascending."""
        names = (path.name for path in self._folder.iterdir() if path.is_dir())
        return tuple(sorted(int(name) for name in names if name.isdecimal()))

    def load(self, num_blocks: int, key: tuple[str, int], trees: Any) -> Any:
        """A program, or None if there is no usable file.

        Args:
            num_blocks: Size of the pool.
            key: Kind and size of the program.
            trees: Arguments and result of the program, as trees of anything.

        Returns:
            An `Executable`, or None.
        """
        path = self._path(num_blocks, key)
        if not path.exists():
            return None
        if not (_is_ours(path.parent) and _is_ours(path)):
            logger.warning("%s is not loaded: others can write to it", path)
            return None
        try:
            facts, payload = _read(path)
            in_tree, out_tree = _structures(trees)
            program = serialize_executable.deserialize_and_load(
                payload,
                in_tree,
                out_tree,
                backend=self._devices[0].client,
                execution_devices=self._devices,
            )
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            jax.errors.JaxRuntimeError,
        ) as error:
            logger.warning("%s is not loaded, but compiled again: %s", path, error)
            return None
        found = frozenset(Fallback(**fallback) for fallback in facts["fallbacks"])
        return Executable(program, found)

    def save(
        self, num_blocks: int, key: tuple[str, int], executable: Executable, trees: Any
    ) -> None:
        """Writes a program; readers see all of the file or none.

        A program that cannot be written is logged: it is compiled again next time.
        """
        path = self._path(num_blocks, key)
        try:
            payload, in_tree, out_tree = serialize_executable.serialize(
                executable.program
            )
            assert (in_tree, out_tree) == _structures(trees)
            facts = {
                "sha256": hashlib.sha256(payload).hexdigest(),
                "fallbacks": [dataclasses.asdict(f) for f in executable.fallbacks],
            }
            path.parent.mkdir(mode=0o700, exist_ok=True)
            # Only the user may read and write what mkstemp makes.
            handle, part = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(json.dumps(facts).encode() + b"\n" + payload)
            Path(part).replace(path)
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
            logger.warning("%s cannot be written: %s", path, error)

    def _path(self, num_blocks: int, key: tuple[str, int]) -> Path:
        return self._folder / str(num_blocks) / f"{key[0]}-{key[1]}"


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    head, _, payload = path.read_bytes().partition(b"\n")
    facts = json.loads(head)
    if facts["sha256"] != hashlib.sha256(payload).hexdigest():
        raise ValueError("it is damaged")
    return facts, payload


def _structures(trees: Any) -> tuple[Any, Any]:
    arguments, result = trees
    return jax.tree.structure((arguments, {})), jax.tree.structure(result)


def _is_ours(path: Path) -> bool:
    """Whether the user owns a file or folder and nobody else may write to it."""
    found = path.stat()
    others = stat.S_IWGRP | stat.S_IWOTH
    return found.st_uid == os.geteuid() and not found.st_mode & others
