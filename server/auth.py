"""Who may use which route: decided on the route that was found, refused by default."""

import hashlib
import hmac
import pathlib
from collections.abc import Collection, Sequence

from aiohttp import web

from jllm import ConfigError
from server.config import ServerConfig
from server.errors import INVALID_REQUEST, ApiError
from server.middleware import Check, Handler

PUBLIC = frozenset({("GET", "/health"), ("GET", "/ready"), ("GET", "/ping")})
"""Method and route of what needs no key; HEAD counts as GET."""
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
CHALLENGE = {"WWW-Authenticate": "Bearer"}
KEY_HASH = web.RequestKey("key_hash", str)
"""Key of a request that holds the digest of its API key."""


def load_keys(config: ServerConfig) -> tuple[str, ...]:
    """Collects the keys of the options and of the file.

    Raises:
        ConfigError: The file cannot be read, or holds no key.
    """
    keys = list(config.api_key or ())
    if config.api_key_file is not None:
        try:
            text = pathlib.Path(config.api_key_file).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"api_key_file={config.api_key_file!r} cannot be read: {error}"
            ) from error
        found = [line.strip() for line in text.splitlines() if line.strip()]
        if not found:
            raise ConfigError(f"api_key_file={config.api_key_file!r} holds no key")
        keys += found
    return tuple(keys)


class Guard:
    """Checks keys, and the Host header where no key protects a local server."""

    def __init__(
        self,
        config: ServerConfig,
        keys: Sequence[str],
        public_paths: Collection[str] = (),
    ) -> None:
        """Keeps digests of the keys only.

        Args:
            config: Options.
            keys: Those that open everything.
            public_paths: Files of the page, which asks for a key itself.
        """
        self._public = PUBLIC | {("GET", path) for path in public_paths}
        self._digests = [_digest(key) for key in keys]
        is_local = config.host in LOOPBACK_NAMES
        self._hosts: frozenset[str] | None = None
        if not keys and (is_local or config.allowed_hosts):
            names = {name.lower() for name in config.allowed_hosts or ()}
            self._hosts = LOOPBACK_NAMES | names | {config.host.lower()}

    def middleware(self) -> Check:
        """The check, for aiohttp."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            self.check(request)
            return await handler(request)

        return check

    def check(self, request: web.Request) -> None:
        """Lets a request through.

        Raises:
            ApiError: Its key or its Host is missing or wrong.
        """
        if self._is_public(request):
            return
        if self._digests:
            request[KEY_HASH] = self._check_key(request)
        elif self._hosts is not None:
            self._check_host(request)

    def _is_public(self, request: web.Request) -> bool:
        """Whether the route that was found needs no key."""
        resource = request.match_info.route.resource
        method = "GET" if request.method == "HEAD" else request.method
        return resource is not None and (method, resource.canonical) in self._public

    def _check_key(self, request: web.Request) -> str:
        headers = request.headers.getall("Authorization", [])
        if not headers:
            raise _unauthorized("no API key was given", None)
        scheme, _, key = headers[0].partition(" ")
        given = _digest(key)
        # All are compared, whatever was found: the time tells nothing.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if len(headers) != 1 or scheme != "Bearer" or not any(matches):
            raise _unauthorized("the API key is wrong", "invalid_api_key")
        return given.hex()

    def _check_host(self, request: web.Request) -> None:
        hosts = request.headers.getall("Host", [])
        name = hosts[0].lower() if len(hosts) == 1 else ""
        if not name.endswith("]"):
            name = name.rpartition(":")[0] or name
        if self._hosts is not None and name not in self._hosts:
            raise ApiError(
                403,
                "the Host header names another host than this server listens on",
                code="forbidden_host",
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _unauthorized(message: str, code: str | None) -> ApiError:
    return ApiError(401, message, type=INVALID_REQUEST, code=code, headers=CHALLENGE)
