"""The HTTP server under load, overload and over time."""
