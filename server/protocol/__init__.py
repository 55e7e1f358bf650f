"""Requests and answers as pydantic types, one module per API."""
