"""Everything that needs a GPU, in one go; see `benchmarks/gpu.sh`."""
