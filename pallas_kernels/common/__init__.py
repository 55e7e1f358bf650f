"""What several kernels share: checks of arguments, and pieces of attention."""
