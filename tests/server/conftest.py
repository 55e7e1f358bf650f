"""The server's fixtures."""

import ipaddress
import socket

import pytest

from tests.server.fakes import serve

__all__ = ["connections", "serve"]


@pytest.fixture(autouse=True)
def connections(monkeypatch):
    """Addresses that a test has connected to; none may be another machine's."""
    addresses = []
    connect = socket.socket.connect

    def note(self, address):
        if self.family not in (socket.AF_INET, socket.AF_INET6):
            return connect(self, address)
        addresses.append(address)
        if not _is_here(address[0]):
            raise OSError(f"tests do not connect to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", note)
    yield addresses
    assert [address for address in addresses if not _is_here(address[0])] == []


def _is_here(host):
    return host == "localhost" or ipaddress.ip_address(host).is_loopback
