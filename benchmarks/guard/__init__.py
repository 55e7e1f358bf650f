"""Counts that may not grow unnoticed: what steps cost, what compilers make of them."""
