"""Root-mean-square normalisation, with what usually comes before and after it."""

from pallas_kernels.rms_norm.api import Normed, rms_norm

__all__ = ["Normed", "rms_norm"]
