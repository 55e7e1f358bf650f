"""What the engine and the models may know of the kernels: the choice, not the calls."""

from pallas_kernels.common.dispatch import (
    Fallback,
    Implementation,
    collect_fallbacks,
)
from pallas_kernels.common.target import Target

__all__ = ["Fallback", "Implementation", "Target", "collect_fallbacks"]
