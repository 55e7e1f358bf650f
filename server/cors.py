"""Cross-origin requests: off unless origins are named."""

from collections.abc import Sequence

from aiohttp import web

from server.middleware import Check, Handler

METHODS = "GET, POST, DELETE"
HEADERS = "Authorization, Content-Type, X-Request-Id, X-Stainless-OS"
MAX_AGE_SECONDS = "600"


class Cors:
    """Answers browsers that ask whether a page of another origin may call."""

    def __init__(self, origins: Sequence[str]) -> None:
        """Takes the origins; * is any."""
        self._origins = frozenset(origins)

    def middleware(self) -> Check:
        """Answers the question that browsers ask before the request itself."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            is_question = (
                request.method == "OPTIONS"
                and "Access-Control-Request-Method" in request.headers
            )
            if is_question and self._allows(request):
                asked = request.headers.get("Access-Control-Request-Headers", HEADERS)
                return web.Response(
                    status=204,
                    headers={
                        "Access-Control-Allow-Methods": METHODS,
                        "Access-Control-Allow-Headers": asked,
                        "Access-Control-Max-Age": MAX_AGE_SECONDS,
                    },
                )
            return await handler(request)

        return check

    async def add_headers(
        self, request: web.Request, response: web.StreamResponse
    ) -> None:
        """Signal of an answer that begins: lets the page read it."""
        if self._allows(request):
            response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
            response.headers["Access-Control-Expose-Headers"] = "X-Request-Id"
            response.headers.add("Vary", "Origin")

    def _allows(self, request: web.Request) -> bool:
        origin = request.headers.get("Origin")
        return origin is not None and bool({origin, "*"} & self._origins)
