"""Other kernels for the same work, each skipped by name where it is not to be had."""

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common.cases import KernelCase

Peer = Callable[[KernelCase, tuple[jax.Array, ...]], float]
"""Seconds of one call on the arguments of a case."""


class NotAvailableError(Exception):
    """The peer cannot do this here; the text says why."""


def dense_keys(case_arguments: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Keys and values `[S, N, K, D]` that a paged case holds, laid out densely."""
    kv, tables = case_arguments[1], case_arguments[2]
    blocks = kv.at[tables].get(mode="clip")  # [S, M, 2, K, P, D]
    rows, _, _, heads, _, width = blocks.shape
    dense = blocks.transpose(2, 0, 1, 4, 3, 5).reshape(2, rows, -1, heads, width)
    return dense[0], dense[1]


def cudnn_decode(q: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array):
    """cuDNN's fused attention of one query per row."""
    return jax.nn.dot_product_attention(
        q[:, None],
        keys,
        values,
        key_value_seq_lengths=lengths,
        query_seq_lengths=jnp.ones_like(lengths),
        implementation="cudnn",
    )


def cudnn_prefill(q: jax.Array, keys: jax.Array, values: jax.Array):
    """cuDNN's fused causal attention of one sequence."""
    return jax.nn.dot_product_attention(
        q[None], keys, values, is_causal=True, implementation="cudnn"
    )


def jax_paged(q: jax.Array, keys: jax.Array, values: jax.Array, tables, lengths):
    """The paged attention for GPUs in the jax tree; `keys` are `[K, B, P, D]`."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    return paged_attention(q, keys, values, tables, lengths)


def jax_decode(q: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array):
    """The decode attention for GPUs in the jax tree."""
    from jax.experimental.pallas.ops.gpu.decode_attention import gqa

    heads = keys.shape[2]
    grouped = q.reshape(q.shape[0], heads, -1, q.shape[-1])
    return jax.vmap(partial(gqa))(
        grouped.reshape(q.shape), keys, values, kv_seq_len=lengths
    )


def torch_sdpa(case: KernelCase, arguments: tuple[jax.Array, ...]) -> float:
    """torch's scaled_dot_product_attention, timed by CUDA events."""
    torch, tensors = _torch_tensors(arguments)
    functional = torch.nn.functional
    q, keys, values = tensors
    causal = case.operation == "ragged_attention"
    run = partial(
        functional.scaled_dot_product_attention,
        q,
        keys,
        values,
        is_causal=causal,
        enable_gqa=True,
    )
    return _torch_seconds(torch, run)


def torch_flex(case: KernelCase, arguments: tuple[jax.Array, ...]) -> float:
    """torch's FlexAttention, compiled, timed by CUDA events."""
    torch, (q, keys, values) = _torch_tensors(arguments)
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    attention = torch.compile(flex.flex_attention, dynamic=False)
    mask = None
    if case.operation == "ragged_attention":
        size = q.shape[2]
        mask = flex.create_block_mask(
            lambda b, h, i, j: i >= j, None, None, size, size, device="cuda"
        )
    run = partial(attention, q, keys, values, block_mask=mask, enable_gqa=True)
    return _torch_seconds(torch, run)


def _torch_tensors(arguments: tuple[jax.Array, ...]) -> tuple[Any, list[Any]]:
    """q, keys and values as torch has them: `[S, heads, tokens, D]`."""
    if importlib.util.find_spec("torch") is None:
        raise NotAvailableError("torch is not installed")
    import torch

    if not torch.cuda.is_available():
        raise NotAvailableError("torch sees no GPU")
    keys, values = dense_keys(arguments)
    q = arguments[0]
    q = q[:, None] if q.shape[0] == keys.shape[0] and q.ndim == 3 else q[None]
    tensors = [
        torch.from_dlpack(jnp.array(x)).transpose(1, 2).contiguous()
        for x in (q, keys, values)
    ]
    return torch, tensors


def _torch_seconds(torch: Any, run: Callable[[], Any]) -> float:
    for _ in range(5):
        run()
    spent = []
    flush = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(20):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        spent.append(start.elapsed_time(end) / 1e3)
    return float(np.median(spent))


def jax_peers(case: KernelCase, arguments: tuple[jax.Array, ...]) -> Mapping[str, Any]:
    """Peers written in JAX: name to function and arguments."""
    q = arguments[0]
    if case.operation == "paged_attention" and q.ndim == 3:
        keys, values = dense_keys(arguments)
        kv, tables, lengths = arguments[1:4]
        own = kv.transpose(1, 2, 0, 3, 4)  # [2, K, B, P, D]
        return {
            "cudnn": (cudnn_decode, (q, keys, values, lengths)),
            "jax paged_attention": (
                jax_paged,
                (q, own[0], own[1], tables, lengths),
            ),
            "jax decode_attention": (jax_decode, (q, keys, values, lengths)),
        }
    if case.operation == "ragged_attention" and arguments[2].shape[0] == 1:
        keys, values = dense_keys(arguments)
        size = q.shape[0]
        return {"cudnn": (cudnn_prefill, (q, keys[:, :size], values[:, :size]))}
    return {}


TORCH_PEERS: Mapping[str, Peer] = {"torch sdpa": torch_sdpa, "torch flex": torch_flex}
