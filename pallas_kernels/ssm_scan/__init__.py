"""The selective state space scan of Mamba-2, over packed sequences and by one token."""

from pallas_kernels.ssm_scan.api import (
    SsmInputs,
    SsmParameters,
    ssm_scan,
    ssm_step,
)

__all__ = ["SsmInputs", "SsmParameters", "ssm_scan", "ssm_step"]
