"""Models in one GGUF file: settings, and tensors under Hugging Face's names.

The `gguf` package reads the header and knows the quantizations; here names and settings
are translated. A tensor's rows are dequantised when they are used. Format:
github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jllm.errors import CheckpointError
from jllm.weights.gguf_config import hf_config, hf_name, is_interleaved
from jllm.weights.lazy import Box, LazyArray, LazyTensor

QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K")
"""Types that are read, as GGUF names them."""
SUFFIX = ".gguf"
ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies: a setting in the form of a tensor."""


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Reads the header of a file.

    Returns:
        What a config.json would hold, and the tensors by their Hugging Face names.

    Raises:
        CheckpointError: Damaged, truncated, or of a type that is not read.
        UnsupportedModelError: An architecture or a setting that is not supported.
    """
    reader = _open(path)
    settings = {
        name: _value(path, name, field)
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer.ggml.") or name.endswith("_id")
    }
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for tensor in stored.values():
        _check(path, tensor)
    factors = stored.pop(ROPE_FACTORS, None)
    config = hf_config(
        path,
        settings,
        shapes={name: _shape(tensor) for name, tensor in stored.items()},
        dtype=_saved_dtype(stored),
        rope_factors=None if factors is None else _decode(path, factors)[:].tolist(),
    )
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in stored.items():
        order = (
            _untangled(config["head_dim"]) if is_interleaved(settings, name) else None
        )
        array, kind = _decode(path, tensor, order), tensor.tensor_type.name
        dtype = kind if kind in ("F16", "BF16") else "F32"
        tensors[hf_name(path, name)] = LazyTensor(
            hf_name(path, name), path, dtype, array
        )
    return config, tensors


def _open(path: Path) -> Any:
    import gguf

    try:
        return gguf.GGUFReader(path)
    # A damaged file fails wherever its bytes lead the reader.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: not a sound GGUF file: {reason}") from error


def _value(path: Path, name: str, field: Any) -> Any:
    try:
        return field.contents()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: {name} cannot be read: {reason}") from error


def _shape(tensor: Any) -> tuple[int, ...]:
    """Rows first, as everywhere but in GGUF."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _check(path: Path, tensor: Any) -> None:
    kind, size = tensor.tensor_type.name, path.stat().st_size
    if kind not in QUANTIZATIONS:
        raise CheckpointError(
            f"{path}: tensor {tensor.name!r} has type {kind}, only "
            f"{', '.join(QUANTIZATIONS)} are read"
        )
    if not tensor.n_elements or not len(tensor.shape):
        raise CheckpointError(f"{path}: tensor {tensor.name!r} has no elements")
    if tensor.data_offset + tensor.n_bytes > size:
        raise CheckpointError(
            f"{path}: tensor {tensor.name!r} ends at byte "
            f"{tensor.data_offset + tensor.n_bytes} of a file of {size}"
        )


def _saved_dtype(stored: Mapping[str, Any]) -> str:
    """The type to compute with: that of the matrices, bfloat16 for quantized ones."""
    kinds = {t.tensor_type.name for t in stored.values() if len(t.shape) > 1}
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds == {"F16"} else "bfloat16"


def _decode(
    path: Path,
    tensor: Any,
    order: Callable[[np.ndarray], np.ndarray] | None = None,
) -> LazyArray:
    """The values of a tensor, its rows in another order if one is given."""
    import gguf

    # The reader's own tensor would keep all of its header alive.
    name, shape = tensor.name, _shape(tensor)
    kind, offset = tensor.tensor_type, int(tensor.data_offset)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    columns = shape[-1] if len(shape) > 1 else block
    rows = tensor.n_elements // columns

    def read(box: Box) -> np.ndarray:
        (first, last), (left, right) = box
        wanted = np.arange(first, last)
        wanted = wanted if order is None else order(wanted)
        row_bytes = columns // block * block_bytes
        try:
            stored = np.memmap(path, np.uint8, "r", offset, (rows, row_bytes))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: tensor {name!r} cannot be read: {error}"
            ) from error
        start, stop = left // block, -(-right // block)
        raw = np.asarray(stored[wanted, start * block_bytes : stop * block_bytes])
        return _dequantised(raw, kind)[:, left - start * block : right - start * block]

    return LazyArray((rows, columns), read, shape)


def _dequantised(raw: np.ndarray, kind: Any) -> np.ndarray:
    """Rows of bytes to rows of numbers."""
    import gguf

    if kind.name == "F16":
        return raw.view(np.float16)
    if kind.name == "BF16":
        import ml_dtypes

        return raw.view(ml_dtypes.bfloat16)
    return gguf.quants.dequantize(raw, kind)


def _untangled(head_dim: int) -> Callable[[np.ndarray], np.ndarray]:
    """Where rows of q and k lie in llama.cpp's order.

    There RoPE turns neighbouring features of a head; in Hugging Face's order it turns
    the first half with the second.
    """

    def order(rows: np.ndarray) -> np.ndarray:
        head, place = np.divmod(rows, head_dim)
        side, pair = np.divmod(place, head_dim // 2)
        return head * head_dim + 2 * pair + side

    return order
