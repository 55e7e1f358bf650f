"""The gated activation between the two products of an MLP."""

from pallas_kernels.silu_mul.api import silu_mul

__all__ = ["silu_mul"]
