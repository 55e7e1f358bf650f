"""Times the kernels on the device at hand, beside its limits and other kernels."""
