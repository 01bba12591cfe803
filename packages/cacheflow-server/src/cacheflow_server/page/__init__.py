"""The web page of the simple frontend: its files, and the routes that serve them.

The page is a client like any other: it uses `/generate`, `/stats` and `/stats/view`, and nothing here knows an engine. What it
may load is in `CONTENT_SECURITY_POLICY`: its own files and nothing of another host.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

OPEN_PATHS = ("/", "/page/*")
"""What needs no API key, as `cacheflow.edge.Guard` takes it: the page asks for the key that its requests need."""

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "cache-control": "no-cache",  # Kept by the browser, and asked for by its ETag each time: an upgrade is seen at once.
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def routes() -> list[Route]:
    """`GET /`, and `GET /page/NAME` for each of the files that it needs. They are read once, here."""
    found = sorted((file.name, file.read_bytes()) for file in files(__name__).iterdir() if _extension(file.name) in MEDIA_TYPES)
    return [Route("/" if name == "index.html" else f"/page/{name}", _File(name, body), methods=["GET"]) for name, body in found]


class _File:
    """An ASGI application that answers with one file, or with 304 to who has it already."""

    def __init__(self, name: str, body: bytes) -> None:
        self._body = body
        self._media_type = MEDIA_TYPES[_extension(name)]
        self._etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {**HEADERS, "etag": self._etag}
        known = Request(scope).headers.get("if-none-match", "")
        # A proxy that compresses marks the tag as weak: W/"…".
        if self._etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            response = Response(status_code=304, headers=headers)
        else:
            response = Response(self._body, media_type=self._media_type, headers=headers)
        await response(scope, receive, send)


def _extension(name: str) -> str:
    return name.rpartition(".")[2]
