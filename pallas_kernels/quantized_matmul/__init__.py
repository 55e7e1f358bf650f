"""Matrix products with weights that stay as small as a checkpoint stores them."""

from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.packing import (
    from_awq,
    from_gptq,
    pack_int4,
    unpack_int4,
)
from pallas_kernels.quantized_matmul.weights import QuantizedWeight, quantize_per_token

__all__ = [
    "QuantizedWeight",
    "from_awq",
    "from_gptq",
    "pack_int4",
    "quantize_per_token",
    "quantized_matmul",
    "unpack_int4",
]
