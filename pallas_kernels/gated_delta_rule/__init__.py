"""The gated delta rule, over packed sequences and by one token."""

from pallas_kernels.gated_delta_rule.api import (
    DeltaInputs,
    gated_delta_rule,
    gated_delta_step,
)

__all__ = ["DeltaInputs", "gated_delta_rule", "gated_delta_step"]
