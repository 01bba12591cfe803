"""`cacheflow top`: the live view of a server in a terminal, from its `/stats` and `/stats/view`.

It owns asking and the keyboard; what a frame looks like is in `top_frame`. It knows a server only by its address, and imports
no engine.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import click
from rich.console import Console, RenderableType
from rich.live import Live

from cacheflow.edge import keys_from_environment
from cacheflow.entrypoints.top_frame import History, Reading, frame, printable
from cacheflow.errors import CacheflowError

TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 64 * 2**20
QUIT_KEYS = (b"q", b"Q")


class ServerError(CacheflowError):
    """The server can't be reached, or refused to give its numbers."""


@click.command()
@click.argument("url", default="http://localhost:8001")
@click.option("--api-key", help="Where the server wants one. Better in CACHEFLOW_API_KEY; of several there, the first is sent.")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 60),
    default=0.5,
    show_default=True,
    metavar="SECONDS",
    help="Between two readings.",
)
@click.option("--once", is_flag=True, help="Print one reading and end, for scripts.")
def top(url: str, api_key: str | None, interval: float, once: bool) -> None:
    """Watch the server at URL: its KV blocks, requests, rates and latencies. Press q to end."""
    server = _Server(url, next(iter(keys_from_environment()), None) if api_key is None else api_key)
    console, history = Console(), History()
    if once:
        history.add(server.read())
        console.print(frame(history, url, console.size.width, None, has_colours=console.color_system is not None))
        return
    server.read()  # A wrong address or key is an error at once; what fails later is shown and tried again.
    with contextlib.suppress(KeyboardInterrupt):
        _watch(server, history, console, url, interval)


def _watch(server: _Server, history: History, console: Console, url: str, interval: float) -> None:
    """Shows frames until a key, or a signal, ends it; the terminal is then as it was."""
    is_ending = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal is_ending
        if not is_ending:
            # Noted as well as raised, because Python drops what is raised inside a destructor or a callback.
            is_ending = True
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)

    def picture(problem: str | None) -> RenderableType:
        return frame(history, url, *console.size, problem, has_colours=console.color_system is not None)

    with _keys() as key_within, Live(console=console, screen=True, auto_refresh=False) as live:
        while not is_ending:
            problem = None
            try:
                history.add(server.read())
            except ServerError as error:
                problem = str(error)
            live.update(picture(problem), refresh=True)
            end_s, size = time.monotonic() + interval, console.size
            while not is_ending and (left_s := end_s - time.monotonic()) > 0:
                if key_within(min(left_s, 0.1)):
                    return
                if console.size != size:
                    size = console.size
                    live.update(picture(problem), refresh=True)


class _Server:
    """A server by its address."""

    def __init__(self, url: str, api_key: str | None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise click.UsageError(f"{url} is not the address of a server. It looks like http://localhost:8001.")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise click.UsageError("An API key is printable ASCII.")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._url = url
        self._path = parts.path.rstrip("/")
        self._connection = kind(parts.hostname, port, timeout=TIMEOUT_S)
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}

    def read(self) -> Reading:
        """A reading of the engine.

        Raises:
            ServerError: Nobody answers, or not with numbers.
        """
        # A connection of its own for each reading: one that was left idle may have been closed by the server.
        with contextlib.closing(self._connection):
            view, stats = self._get("/stats/view"), self._get("/stats")
        try:
            return Reading(stats["model"], view["stats"], stats["latency"], view["requests"], view["blocks"], time.monotonic())
        except (KeyError, TypeError) as error:
            raise ServerError(f"{self._url} answers, but is no server of cacheflow.") from error

    def _get(self, route: str) -> Any:
        try:
            self._connection.request("GET", self._path + route, headers=self._headers)
            response = self._connection.getresponse()
            body = response.read(MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"No server answers at {self._url} ({error or type(error).__name__}).") from error
        try:
            document = json.loads(body)
        except ValueError as error:
            raise ServerError(f"{self._url} answers, but is no server of cacheflow.") from error
        if response.status == 401:
            raise ServerError(f"{self._url} needs an API key: give it in CACHEFLOW_API_KEY, or with --api-key.")
        if response.status != 200:
            told = document.get("error") if isinstance(document, dict) else None
            message = str(told.get("message") or "") if isinstance(told, dict) else ""
            raise ServerError(f"{self._url} answers with status {response.status}. {printable(message)}".rstrip())
        return document


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Takes keys as they are pressed, and gives the terminal back as it was.

    Yields:
        A function that waits for so many seconds and returns whether a key to end was pressed.
    """
    if not sys.stdin.isatty():
        # Without a keyboard it runs until it is interrupted.
        yield lambda seconds: bool(time.sleep(seconds))  # type: ignore[func-returns-value]
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def is_quit_within(seconds: float) -> bool:
        ready, _, _ = select.select([terminal], [], [], seconds)
        if not ready:
            return False
        keys = os.read(terminal, 64)
        return not keys or any(key in keys for key in QUIT_KEYS)

    try:
        tty.setcbreak(terminal)
        yield is_quit_within
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
