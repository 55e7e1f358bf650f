"""Handlers, one module per API."""
