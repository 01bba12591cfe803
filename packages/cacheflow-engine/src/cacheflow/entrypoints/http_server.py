"""A port of a frontend's process: its sockets, its connections, and what answers there until there is an application.

It owns uvicorn's server. It knows no engine, and no route but `/health` while there is no application.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import resource
import socket
from collections.abc import Sequence
from typing import Any

import uvicorn

from cacheflow.asgi import ErrorAnswer, Receive, Send, error_document, send_answer, send_error
from cacheflow.edge import EdgeOptions, Guard
from cacheflow.entrypoints.turns import ACCEPTED_AT_A_TIME, TurnTakingServer, turn_taking_protocol
from cacheflow.errors import ConfigError

LAST_WORD_S = 2
"""How long after --drain-timeout an answer may take to tell its error, before it is cut off."""
MOST_FILES = 65_536
"""That a server's process may have open, connections among them, where the system lets it."""
SPARE_FILES = 256
"""Those that are not for connections: no client can keep the server from starting its engine anew, or from its metrics."""
MOST_SCRAPERS = 64
"""Connections of the metrics port."""


class HttpServer:
    """Listens from the moment it is made, and answers from `start` to `end`.

    Args:
        options: Who may call, and how.
        port: To listen on; 0 takes a free one.
        max_connections: At a time.

    Attributes:
        url: Where it is.

    Raises:
        ConfigError: No such host, or the port is taken.
    """

    def __init__(self, options: EdgeOptions, port: int, max_connections: int) -> None:
        self._sockets = _listen(options.host, port)
        self.url = _url(options, self._sockets)
        self._door = _Door(options)
        self._server = _Server(
            uvicorn.Config(
                self._door,
                http=turn_taking_protocol(options.receive_timeout, max_connections),
                backlog=ACCEPTED_AT_A_TIME,
                h11_max_incomplete_event_size=options.max_header_bytes,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                server_header=False,
                root_path=options.root_path,
                ssl_certfile=options.ssl_certfile,
                ssl_keyfile=options.ssl_keyfile,
                timeout_graceful_shutdown=math.ceil(options.drain_timeout) + LAST_WORD_S,
            )
        )

    @property
    def app(self) -> Any:
        """What answers."""
        return self._door.app

    @app.setter
    def app(self, app: Any) -> None:
        self._door.app = app

    def start(self) -> asyncio.Future[None]:
        """Begins to answer; what is returned is done when the server has ended."""
        return asyncio.ensure_future(self._server.serve(sockets=self._sockets))

    def end(self, timeout_s: float | None = None) -> None:
        """Takes no more connections, and ends when the answers that run are sent, or after about `timeout_s`."""
        if timeout_s is not None:
            self._server.config.timeout_graceful_shutdown = math.ceil(timeout_s) + LAST_WORD_S
        self._server.should_exit = True

    def end_now(self) -> None:
        """Ends, whatever runs."""
        self._server.force_exit = self._server.should_exit = True


class _Server(TurnTakingServer):
    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()  # The engine must be closed before a signal may end the process.


def allow_many_connections() -> None:
    """Raises the number of files that this process may open, from the usual 1,024: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections() -> int:
    """How many clients' connections there may be, now that so many files may be open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_files = MOST_FILES if soft == resource.RLIM_INFINITY else soft
    return max(num_files - SPARE_FILES, num_files // 2)  # The latter where the system allows very few.


class _Door:
    """The ASGI application that stands before the frontend's own, which can't be made until the engine is there."""

    def __init__(self, options: EdgeOptions) -> None:
        self.app: Any = Guard(_answer_while_loading, options)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


async def _answer_while_loading(scope: Any, receive: Receive, send: Send) -> None:
    if scope["path"].removeprefix(scope["root_path"]) == "/health":
        await send_answer(send, 200, "application/json", b'{"status": "alive"}')
    else:
        document = error_document("The engine is loading its model.", "server_error", code="not_ready")
        await send_error(send, ErrorAnswer(503, document, {"retry-after": "1"}))


def _url(options: EdgeOptions, sockets: Sequence[socket.socket]) -> str:
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"http{'s' if options.ssl_certfile else ''}://{host}:{sockets[0].getsockname()[1]}"


def _listen(host: str, port: int) -> list[socket.socket]:
    """Listens on every address of `host` ("localhost" has two), under one port.

    Raises:
        ConfigError: No such host, or the port is taken.
    """
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                listener = socket.socket(family, kind, protocol)
            except OSError:
                continue  # The host's name has an address of a family that this kernel doesn't have.
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                listener.bind((address[0], port, *address[2:]))
                listener.listen(2048)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                sockets.remove(listener)
                listener.close()
                continue
            port = listener.getsockname()[1]
    except OSError as error:
        for listener in sockets:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {port} of {host} is in use. Choose another with --port, or end what listens there."
            ) from error
        raise ConfigError(
            f"Can't listen on port {port} of {host}: {error.strerror or error}. Choose others with --host and --port."
        ) from error
    if not sockets:
        raise ConfigError(f"{host} is no address of this machine. Choose another with --host.")
    return sockets
