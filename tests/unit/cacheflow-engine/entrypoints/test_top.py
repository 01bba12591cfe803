"""How `cacheflow top` reads a server, on servers that are none of ours."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cacheflow.entrypoints.top import ServerError, _Server

Serve = Callable[[int, bytes], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that gives one answer to everything, and returns its address."""
    servers: list[HTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (200, b"hello", "is no server of cacheflow"),
        (200, b"{}", "is no server of cacheflow"),
        (200, b"[]", "is no server of cacheflow"),
        (404, b'{"error": "Not Found"}', "with status 404."),
        (404, b'{"error": {"message": null}}', "with status 404."),
        (500, b"[1]", "with status 500."),
        (503, b'{"error": {"message": "The engine is gone."}}', "with status 503. The engine is gone."),
    ],
)
def test_an_answer_of_another_kind_is_a_sentence(serve: Serve, status: int, body: bytes, sentence: str) -> None:
    with pytest.raises(ServerError, match=sentence):
        _Server(serve(status, body), None).read()


def test_what_a_server_says_can_not_steer_the_terminal(serve: Serve) -> None:
    url = serve(500, b'{"error": {"message": "a\\u001b[2Jb"}}')
    with pytest.raises(ServerError, match=r"a\?\[2Jb"):
        _Server(url, None).read()
