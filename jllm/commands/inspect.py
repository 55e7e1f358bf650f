"""`jllm inspect`: sizes and sharding of a model, without loading it."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jllm.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_parser(commands: Any) -> None:
    """Adds `inspect` to the commands of `jllm`."""
    parser = commands.add_parser(
        "inspect",
        help="print sizes and sharding of a model, without loading it",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, quiet=False)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder, config.json, GGUF file or Hugging Face id, of which only "
        "config.json is fetched; none is the embedded model",
    )
    parser.add_argument("--revision", metavar="NAME", help="of a Hugging Face id")
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="devices that share each layer; they need not be there",
    )
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="of the weights; auto: as saved"
    )
    parser.add_argument(
        "--kv-cache-dtype", default="auto", choices=DTYPES, help="auto: as the weights"
    )
    parser.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="context whose cache is sized; none is the model's longest",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Prints what is known of a model from its settings and headers."""
    for name in ("tensor_parallel_size", "max_model_len"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    report = make_report(options)
    print(json.dumps(report) if options.json else "\n".join(_as_text(report)))
    return 0


def make_report(options: argparse.Namespace) -> dict[str, Any]:
    """What is printed, in the form of `--json`."""
    from jllm.engine.create import DEFAULT_MODEL
    from jllm.engine.options import saved_dtype
    from jllm.models.base import ModelOptions
    from jllm.models.hf_config import longest_context
    from jllm.models.registry import architecture_of, build_model
    from jllm.weights.hub import resolve_config
    from jllm.weights.summary import summarize
    from shardings.mesh import abstract_mesh

    files = resolve_config(
        options.model or str(DEFAULT_MODEL), revision=options.revision
    )
    longest = longest_context(files.config)
    context = options.max_model_len or longest
    if context > longest:
        raise ConfigError(
            f"max_model_len={context} exceeds the {longest} tokens that the model's "
            "position embeddings reach"
        )
    dtype = saved_dtype(files.config) if options.dtype == "auto" else options.dtype
    kv_dtype = dtype if options.kv_cache_dtype == "auto" else options.kv_cache_dtype
    size = options.tensor_parallel_size
    alone = ModelOptions(dtype=dtype, kv_dtype=kv_dtype, max_model_len=context)
    shared = dataclasses.replace(alone, mesh=abstract_mesh(tensor=size))
    model = build_model(files.config, shared)
    summary = summarize(model, build_model(files.config, alone))
    sizes = dataclasses.asdict(summary)
    rows = sizes.pop("rows")
    return {
        "model": str(files.path),
        "architecture": architecture_of(files.config),
        "dtype": dtype,
        "kv_cache_dtype": kv_dtype,
        "tensor_parallel_size": size,
        **sizes,
        "checkpoint": _checkpoint(files, model),
        "table": rows,
    }


def _checkpoint(files: Any, model: Any) -> dict[str, Any] | None:
    """What the headers of the weights say, None where there are no weights."""
    from jllm.weights.formats import has_weights
    from jllm.weights.loader import used_tensors

    if not has_weights(files):
        return None
    specs = model.specs()
    ignore = () if "head" in specs else ("lm_head.weight",)
    tensors = used_tensors(files, specs, ignore=ignore)
    return {
        "tensors": len(tensors),
        "dtypes": sorted({tensor.dtype for tensor in tensors.values()}),
    }


def _as_text(report: Mapping[str, Any]) -> list[str]:
    """The lines of the report for people."""
    size = report["tensor_parallel_size"]
    devices = "" if size == 1 else f" on each of {size} devices"
    checkpoint = report["checkpoint"]
    found = "no weights here, only settings"
    if checkpoint:
        kinds = ", ".join(checkpoint["dtypes"])
        found = f"{checkpoint['tensors']} tensors of {kinds} fit the settings"
    token, share = (report[f"kv_bytes_per_token{part}"] for part in ("", "_per_device"))
    facts = [
        ("model", report["model"]),
        ("architecture", report["architecture"]),
        ("checkpoint", found),
        ("parameters", f"{report['parameters']:,}"),
        ("weights", f"{_bytes(report['weight_bytes'])} as {report['dtype']}"),
        ("", f"{_bytes(report['weight_bytes_per_device'])}{devices or ' on a device'}"),
        ("KV per token", f"{_bytes(token)} as {report['kv_cache_dtype']}"),
        (
            "KV of a context",
            f"{_bytes(report['context_bytes'])} for {report['max_model_len']:,} tokens",
        ),
    ]
    if size > 1:
        whole = report["context_bytes_per_device"]
        facts.insert(7, ("", f"{_bytes(share)}{devices}"))
        facts.append(("", f"{_bytes(whole)}{devices}"))
    return [f"{name:<16}{value}" for name, value in facts] + ["", *_table(report)]


def _table(report: Mapping[str, Any]) -> list[str]:
    """The sharding table, in columns."""
    lines = [
        ("parameter", "shape", "dtype", "axes", "mesh axes", "per device", "bytes")
    ]
    for row in report["table"]:
        count = f" x{row['count']}" if row["count"] > 1 else ""
        lines.append(
            (
                row["name"] + count,
                _shape(row["shape"]),
                row["dtype"],
                " ".join(axis or "-" for axis in row["axes"]),
                " ".join("+".join(axes) or "-" for axes in row["mesh_axes"]),
                _shape(row["shape_per_device"]),
                _bytes(row["bytes_per_device"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [_columns(line, widths) for line in lines]


def _columns(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
    return "  ".join([*cells[:-1], line[-1].rjust(widths[-1])]).rstrip()


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
