"""The server's fixtures."""

from tests.server.fakes import serve

__all__ = ["serve"]
