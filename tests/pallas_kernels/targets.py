"""For which devices the tests of kernels compile."""

import jax

from pallas_kernels.common.target import Target


def gpu_target():
    """The GPU in use, or a Hopper that is not there, whose kernels are interpreted."""
    device = jax.devices()[0]
    if device.platform == "gpu":
        return Target.of(device)
    return Target("gpu", "sm_90", "h200", 132, interpret=True)
