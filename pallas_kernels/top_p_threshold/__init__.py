"""Which scores top-k and top-p keep, found without sorting."""

from pallas_kernels.top_p_threshold.api import top_p_threshold

__all__ = ["top_p_threshold"]
