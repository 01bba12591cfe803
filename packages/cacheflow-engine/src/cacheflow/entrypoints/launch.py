"""Starts a frontend as a process of its own: options, engine, HTTP server, and an orderly end.

It owns the life of the process. It knows frontends only as members of the `cacheflow.frontends` group, and no route of theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cacheflow.asgi import Receive, Send, error_document
from cacheflow.config import EngineConfig, flag_of
from cacheflow.entrypoints.gone import refuse_gone_options
from cacheflow.entrypoints.options import build, options_from
from cacheflow.errors import CacheflowError, ConfigError, PluginError
from cacheflow.interfaces import Frontend
from cacheflow.plugins import find_plugins, load_plugin

if TYPE_CHECKING:
    from cacheflow.async_server import AsyncLLMServer

GROUP = "cacheflow.frontends"
PACKAGES = {"simple": "cacheflow-server", "openai": "cacheflow-openai"}
GRACE_S = 5
"""How long running answers may go on after SIGTERM before they end with an error."""
LAST_WORD_S = 2
"""How long after the grace an answer may take to tell its error, before it is cut off."""


def main(name: str, argv: Sequence[str] | None = None) -> None:
    """Runs a frontend's command as a program and ends the process.

    Args:
        name: Of the frontend in its group.
        argv: The arguments. None: the process's own.
    """
    try:
        command = frontend_command(name)
    except PluginError as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(1) from error
    command.main(args=None if argv is None else list(argv))


def frontend_command(name: str) -> click.Command:
    """The command that serves one frontend: its own options, the engine's, and `--engine`.

    Raises:
        PluginError: The frontend is not installed, with the package to install, or can't be loaded.
    """
    if name not in find_plugins(GROUP):
        hint = f" In a clone of cacheflow: pip install ./packages/{PACKAGES[name]}" if name in PACKAGES else ""
        raise PluginError(f"The frontend {name!r} is not installed.{hint}")
    frontend: type[Frontend] = load_plugin(GROUP, name)

    @click.pass_context
    def run(context: click.Context, /, engine: str | None, **values: Any) -> None:
        options, config = build(frontend.options, values), build(EngineConfig, values)
        if engine is not None:
            for entry in fields(EngineConfig):
                if context.get_parameter_source(entry.name) is ParameterSource.COMMANDLINE:
                    raise click.UsageError(
                        f"{flag_of(entry.name)} is for a new engine; {engine} already has its own. Leave it out."
                    )
        try:
            asyncio.run(serve(frontend, options, config, engine))
        except CacheflowError as error:
            raise click.ClickException(str(error)) from error

    command = click.Command(
        name,
        callback=run,
        help=(frontend.__doc__ or "").strip().split("\n\n")[0],
        context_settings={"show_default": True, "max_content_width": 100},
    )
    command = options_from(frontend.options)(command)
    command = click.option("--engine", metavar="ADDRESS", help="A running `cacheflow engine`. Default: start one.")(command)
    return refuse_gone_options(options_from(EngineConfig)(command))


async def serve(frontend: type[Frontend], options: Any, config: EngineConfig, engine_address: str | None = None) -> None:
    """Serves until SIGTERM or SIGINT. The port is open while the engine loads: /health is 200, all else 503.

    Args:
        frontend: The frontend's class.
        options: An instance of its `options`.
        config: Of the engine to start.
        engine_address: Of a running engine, to be used instead.

    Raises:
        CacheflowError: The port can't be had, or the engine can't be started.
    """
    # These cost a second together, so they are not paid by --help.
    import uvicorn

    from cacheflow.async_server import AsyncLLMServer

    class Server(uvicorn.Server):
        def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
            return contextlib.nullcontext()  # The engine must be closed before a signal may end the process.

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("cacheflow").setLevel(logging.INFO)
    sockets = _listen(options.host, options.port)
    url = f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{sockets[0].getsockname()[1]}"
    door = _Door()
    server = Server(
        uvicorn.Config(
            door, lifespan="off", log_config=None, log_level="warning", timeout_graceful_shutdown=GRACE_S + LAST_WORD_S
        )
    )
    serving = asyncio.ensure_future(server.serve(sockets=sockets))
    starting: asyncio.Future[AsyncLLMServer] = asyncio.ensure_future(
        AsyncLLMServer.start(config) if engine_address is None else AsyncLLMServer.connect(engine_address)
    )
    with _signals(server) as ending:
        try:
            await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                engine = starting.result()
                door.app = frontend.create_app(engine, options)
                print(f"Serving {engine.model_info.model} at {url}", flush=True)
                await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait((serving,), timeout=GRACE_S)
        finally:
            server.should_exit = True
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            if not starting.cancelled() and starting.exception() is None:
                await starting.result().close()  # Answers that still run thereby end with an error of their own.
            await asyncio.gather(serving, return_exceptions=True)
    serving.result()


class _Door:
    """The ASGI application that stands before the frontend's own, which can't be made until the engine is there."""

    def __init__(self) -> None:
        self.app: Any = None

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
            return
        import json

        headers = [(b"content-type", b"application/json")]
        if scope["path"] == "/health":
            status, document = 200, {"status": "alive"}
        else:
            status, document = 503, error_document("The engine is loading its model.", "server_error", code="not_ready")
            headers.append((b"retry-after", b"1"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(document).encode()})


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


@contextlib.contextmanager
def _signals(server: Any) -> Iterator[asyncio.Future[None]]:
    """SIGINT and SIGTERM end the server: the first when running answers are done, the second at once.

    Yields:
        What is done with the first.
    """
    loop = asyncio.get_running_loop()
    ending = loop.create_future()

    def end() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True
        if not ending.done():
            ending.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    try:
        yield ending
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
