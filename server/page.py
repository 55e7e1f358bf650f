"""The page at /: files of `server/web`, under a policy that lets nothing else in."""

import mimetypes
import pathlib

from aiohttp import web

from server.middleware import Handler

WEB = pathlib.Path(__file__).parent / "web"
INDEX = "index.html"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
SUFFIXES = frozenset({".html", ".css", ".js", ".svg", ".png", ".ico"})


def page_routes(folder: pathlib.Path = WEB) -> list[web.RouteDef]:
    """A route per file, so that no path is ever made of what a client writes.

    Files are read once; a folder without an index has no page.
    """
    if not (folder / INDEX).is_file():
        return []
    routes: list[web.RouteDef] = []
    for file in sorted(folder.iterdir()):
        if file.suffix in SUFFIXES and file.is_file():
            path = "/" if file.name == INDEX else f"/web/{file.name}"
            routes.append(web.get(path, _handler(file)))
    return routes


def _handler(file: pathlib.Path) -> Handler:
    content = file.read_bytes()
    kind = mimetypes.types_map.get(file.suffix, "application/octet-stream")
    charset = "utf-8" if kind.startswith("text/") else None

    async def serve(request: web.Request) -> web.Response:
        del request
        return web.Response(
            body=content, content_type=kind, charset=charset, headers=HEADERS
        )

    return serve
