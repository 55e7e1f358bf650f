"""`jllm convert`: a model's folder in another file format."""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from jllm.errors import CheckpointError, ConfigError

FORMATS = ("orbax", "safetensors")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SHARDS = (8, 4, 2, 1)
"""Numbers of slices that are tried for orbax, where none is given."""
COPIED = ("*.json", "*.jinja", "tokenizer.model")
NOT_COPIED = ("config.json", "orbax.json", "model.safetensors.index.json")


def add_parser(commands: Any) -> None:
    """Adds `convert` to the commands of `jllm`."""
    parser = commands.add_parser(
        "convert", help="write a model in another file format", allow_abbrev=False
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file or id")
    parser.add_argument(
        "out", metavar="OUT", help="folder to make; empty if it is there"
    )
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="auto keeps the saved one"
    )
    parser.add_argument("--revision", metavar="NAME", help="of a Hugging Face id")
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        metavar="N",
        help="orbax: slices of each layer, a file each; none is 8, 4, 2 or 1, the most "
        "that copies no KV head",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no messages but warnings and errors"
    )


def run(options: argparse.Namespace) -> int:
    """Converts a model; the folder appears when it is complete."""
    out = Path(options.out).expanduser()
    _check_target(out)
    size = options.tensor_parallel_size
    if size is not None and (size < 1 or options.format != "orbax"):
        raise ConfigError(
            f"tensor_parallel_size={size} must be at least 1, and is for orbax only"
        )
    import jax

    # The weights stay on the host.
    jax.config.update("jax_platforms", "cpu")
    from jllm.engine.options import saved_dtype
    from jllm.weights.hub import resolve_model

    files = resolve_model(options.model, revision=options.revision)
    dtype = saved_dtype(files.config) if options.dtype == "auto" else options.dtype
    config = _config_in(files.config, dtype)
    with _complete_or_absent(out) as folder:
        if options.format == "orbax":
            _write_orbax(files, folder, dtype, size)
        else:
            _write_safetensors(files, folder, dtype)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _copy_texts(files.path, folder)
    if not options.quiet:
        print(f"{out}: {options.format}, {dtype}", file=sys.stderr)
    return 0


def _check_target(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={str(out)!r} is there and is not an empty folder")


@contextlib.contextmanager
def _complete_or_absent(out: Path) -> Generator[Path]:
    """A folder beside `out` that becomes it in the end, or is removed."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise ConfigError(f"out={str(out)!r} cannot be made: {error}") from error
    try:
        yield folder
        folder.chmod(0o755)
        folder.replace(out)
    except OSError as error:
        raise ConfigError(f"out={str(out)!r} cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _config_in(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json of a model that is saved in a type."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: dtype}


def _write_orbax(files: Any, folder: Path, dtype: str, size: int | None) -> None:
    import jax

    from jllm.weights import orbax
    from jllm.weights.loader import load_weights
    from shardings.mesh import make_mesh
    from shardings.place import tree_shardings

    size, specs = _orbax_layout(files.config, size)
    if jax.config.jax_num_cpu_devices < size:  # pyright: ignore[reportAttributeAccessIssue]
        with contextlib.suppress(RuntimeError):  # the process has its devices already
            jax.config.update("jax_num_cpu_devices", size)
    devices = jax.devices("cpu")
    if len(devices) < size:
        raise ConfigError(
            f"tensor_parallel_size={size} needs as many CPU devices, but JAX was "
            f"started with {len(devices)}"
        )
    places = tree_shardings(specs, make_mesh(tensor=size, devices=devices[:size]))
    weights = load_weights(files, specs, places, dtype, ignore=_tied(specs))
    orbax.save(folder, weights, files.config)


def _orbax_layout(config: Mapping[str, Any], size: int | None) -> tuple[int, Any]:
    """How many slices, and the parameters so laid out."""
    if size is not None:
        return size, _specs(config, size)
    for size in SHARDS:
        with contextlib.suppress(ConfigError):
            specs = _specs(config, size)
            if not _has_copies(specs):
                return size, specs
    raise AssertionError("one slice is always possible")


def _specs(config: Mapping[str, Any], size: int) -> Any:
    from jllm.models.base import ModelOptions
    from jllm.models.registry import build_model
    from shardings.mesh import abstract_mesh

    return build_model(config, ModelOptions(mesh=abstract_mesh(tensor=size))).specs()


def _has_copies(specs: Any) -> bool:
    import jax

    return any(
        part.repeat > 1 for spec in jax.tree.leaves(specs) for part in spec.parts
    )


def _tied(specs: Mapping[str, Any]) -> tuple[str, ...]:
    return () if "head" in specs else ("lm_head.weight",)


def _write_safetensors(files: Any, folder: Path, dtype: str) -> None:
    import jax.numpy as jnp

    from jllm.weights.export import save_safetensors
    from jllm.weights.loader import used_tensors

    specs = _specs(files.config, 1)
    tensors = used_tensors(files, specs, ignore=_tied(specs))
    save_safetensors(folder, tensors, jnp.dtype(dtype))


def _copy_texts(source: Path, folder: Path) -> None:
    """Copies tokenizer, template and generation settings, or makes them from a GGUF."""
    if source.is_file():
        from jllm.text.tokenizer import load_tokenizer

        if not (source.parent / "tokenizer.json").exists():
            with contextlib.suppress(CheckpointError):  # a model without a vocabulary
                load_tokenizer(source).hf.save_pretrained(folder)
            return
        source = source.parent
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.name not in NOT_COPIED:
                shutil.copyfile(file, folder / file.name)
