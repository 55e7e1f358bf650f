"""Meshes, rules from logical to mesh axes, and the placement of weights."""
