"""Pure functions on arrays; the place where sharding and kernels meet."""
