"""The OpenAI-compatible HTTP server; its place, still empty."""
