"""What each step computes, and which blocks it may use; imports no JAX."""
