"""From the orders of int4 weights in checkpoints to the one that kernels read."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt8

from pallas_kernels.quantized_matmul.weights import PACK_BLOCK, QuantizedWeight

NIBBLES = 8  # per int32
# Nibble i of an AWQ word belongs to the channel AWQ_ORDER[i] of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_int4(values: Int[Array, "N K"]) -> UInt8[Array, "N P"]:
    """Packs values 0 ... 15 as `QuantizedWeight` says; K is filled up with zeros."""
    num_channels, num_inputs = values.shape
    padding = -num_inputs % PACK_BLOCK
    padded = jnp.pad(values.astype(jnp.uint8), ((0, 0), (0, padding)))
    halves = padded.reshape(num_channels, -1, 2, PACK_BLOCK // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(num_channels, -1)


def unpack_int4(packed: UInt8[Array, "N P"], num_inputs: int) -> UInt8[Array, "N K"]:
    """Gives the values 0 ... 15 of the first K inputs, one per byte."""
    num_channels = packed.shape[0]
    blocks = packed.reshape(num_channels, -1, 1, PACK_BLOCK // 2)
    halves = jnp.concatenate([blocks & 15, blocks >> 4], axis=2)
    return halves.reshape(num_channels, -1)[:, :num_inputs]


def from_awq(
    qweight: Int[Array, "K W"], qzeros: Int[Array, "G W"], scales: Float[Array, "G N"]
) -> QuantizedWeight:
    """Converts the tensors of an AWQ checkpoint (version "gemm").

    A word of `qweight` or `qzeros` holds eight channels of one input or group, in the
    order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on.

    Source: AWQ, arXiv:2306.00978; AutoAWQ's `WQLinear_GEMM`.
    """
    values, zeros = _unpack_awq(qweight), _unpack_awq(qzeros)
    _check_groups(values.shape[0], zeros, scales)
    return QuantizedWeight(pack_int4(values.T), scales.T, zeros.T.astype(jnp.uint8))


def from_gptq(
    qweight: Int[Array, "W N"],
    qzeros: Int[Array, "G V"],
    scales: Float[Array, "G N"],
    g_idx: Int[Array, " K"] | None = None,
    *,
    zero_offset: int = 1,
) -> QuantizedWeight:
    """Converts the 4-bit tensors of a GPTQ checkpoint.

    A word of `qweight` holds eight inputs of one channel, a word of `qzeros` eight
    channels of one group, both from the lowest bits on.

    Args:
        qweight: Words of eight inputs.
        qzeros: Words of eight zero points, each less by `zero_offset`.
        scales: Factor of each group and channel.
        g_idx: Group of each input, for checkpoints with `desc_act`: the inputs are
            then sorted by group, and the weight keeps their order. None where input k
            belongs to the group k // (K / G).
        zero_offset: 1 for the format "gptq", 0 for "gptq_v2".

    Source: GPTQ, arXiv:2210.17323; AutoGPTQ's `QuantLinear`.
    """
    values = _nibbles(qweight.T).reshape(qweight.shape[1], -1)  # [N, K]
    zeros = _nibbles(qzeros).reshape(qzeros.shape[0], -1)  # [G, N]
    _check_groups(values.shape[1], zeros, scales)
    order = None
    if g_idx is not None:
        if g_idx.shape != (values.shape[1],):
            raise ValueError(
                f"g_idx has shape {g_idx.shape}, expected ({values.shape[1]},)"
            )
        order = jnp.argsort(g_idx, stable=True).astype(jnp.int32)
        values = values[:, order]
    zeros = (zeros + zero_offset).T.astype(jnp.uint8)
    return QuantizedWeight(pack_int4(values), scales.T, zeros, order)


def _check_groups(
    num_inputs: int, zeros: Int[Array, "G C"], scales: Float[Array, "G N"]
) -> None:
    if zeros.shape != scales.shape:
        raise ValueError(
            f"qzeros unpack to {zeros.shape}, scales have shape {scales.shape}"
        )
    if num_inputs % scales.shape[0]:
        raise ValueError(
            f"scales have {scales.shape[0]} groups, which do not divide the "
            f"{num_inputs} inputs"
        )


def _nibbles(words: Int[Array, "A B"]) -> Int[Array, "A B 8"]:
    """The eight nibbles of each word, the lowest first."""
    shifts = jnp.arange(NIBBLES, dtype=words.dtype) * 4
    return (words[:, :, None] >> shifts[None, None, :]) & 15


def _unpack_awq(words: Int[Array, "A B"]) -> Int[Array, "A C"]:
    places = jnp.argsort(jnp.array(AWQ_ORDER))  # nibble that holds each channel
    return _nibbles(words)[:, :, places].reshape(words.shape[0], -1)
