"""Starts a frontend as a process of its own: options, engine, HTTP server, and an orderly end.

It owns the life of the process. It knows frontends only as members of the `cacheflow.frontends` group, and no route of theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import resource
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cacheflow.asgi import ErrorAnswer, Receive, Send, error_document, send_answer, send_error
from cacheflow.config import EngineConfig, flag_of
from cacheflow.edge import EdgeOptions, Guard
from cacheflow.entrypoints.gone import refuse_gone_options
from cacheflow.entrypoints.options import build, options_from
from cacheflow.errors import CacheflowError, ConfigError, EngineDeadError, PluginError
from cacheflow.interfaces import Frontend
from cacheflow.plugins import find_plugins, load_plugin
from cacheflow.status import metrics_app

if TYPE_CHECKING:
    from cacheflow.async_server import AsyncLLMServer

GROUP = "cacheflow.frontends"
PACKAGES = {"simple": "cacheflow-server", "openai": "cacheflow-openai"}
LAST_WORD_S = 2
"""How long after --drain-timeout an answer may take to tell its error, before it is cut off."""
MOST_FILES = 65_536
"""That a server's process may have open, connections among them, where the system lets it."""
SPARE_FILES = 256
"""Those that are not for connections: no client can keep the server from starting its engine anew, or from its metrics."""
MOST_SCRAPERS = 64
"""Connections of the metrics port."""


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
    def run(context: click.Context, /, engine: str | None, engine_key: str | None, **values: Any) -> None:
        options, config = build(frontend.options, values), build(EngineConfig, values)
        if engine is None and engine_key is not None:
            raise click.UsageError("--engine-key is for --engine tcp://HOST:PORT; an engine of this server's own needs none.")
        if engine is not None:
            for entry in fields(EngineConfig):
                if context.get_parameter_source(entry.name) is ParameterSource.COMMANDLINE:
                    raise click.UsageError(
                        f"{flag_of(entry.name)} is for a new engine; {engine} already has its own. Leave it out."
                    )
        try:
            asyncio.run(serve(frontend, options, config, engine, engine_key))
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
    command = click.option("--engine-key", metavar="FILE", help="A copy of that engine's --engine-key, for TCP.")(command)
    return refuse_gone_options(options_from(EngineConfig)(command))


async def serve(
    frontend: type[Frontend],
    options: Any,
    config: EngineConfig,
    engine_address: str | None = None,
    key_file: str | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT. The port is open while the engine loads: /health is 200, all else 503.

    The first signal drains: new requests are refused with 503, running ones finish. The second ends at once. An engine of its
    own that keeps dying ends it too.

    Args:
        frontend: The frontend's class.
        options: An instance of its `options`.
        config: Of the engine to start.
        engine_address: Of a running engine, to be used instead.
        key_file: Of that engine's key.

    Raises:
        CacheflowError: The port can't be had, the engine can't be started, or it died too often.
    """
    # These cost a second together, so they are not paid by --help.
    import uvicorn

    from cacheflow.async_server import AsyncLLMServer
    from cacheflow.entrypoints.turns import ACCEPTED_AT_A_TIME, TurnTakingServer, collect_seldom, turn_taking_protocol
    from cacheflow.service.short_turns import take_short_turns

    class Server(TurnTakingServer):
        def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
            return contextlib.nullcontext()  # The engine must be closed before a signal may end the process.

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("cacheflow").setLevel(logging.INFO)
    # A frontend of others may have options of its own; it is guarded while the engine loads, and itself from then on.
    edge = options if isinstance(options, EdgeOptions) else EdgeOptions(host=options.host, port=options.port)

    def make_server(door: _Door, max_connections: int) -> Server:
        return Server(
            uvicorn.Config(
                door,
                http=turn_taking_protocol(edge.receive_timeout, max_connections),
                backlog=ACCEPTED_AT_A_TIME,
                h11_max_incomplete_event_size=edge.max_header_bytes,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                server_header=False,
                root_path=edge.root_path,
                ssl_certfile=edge.ssl_certfile,
                ssl_keyfile=edge.ssl_keyfile,
                timeout_graceful_shutdown=math.ceil(edge.drain_timeout) + LAST_WORD_S,
            )
        )

    allow_many_connections()
    take_short_turns()
    sockets = _listen(edge.host, edge.port)
    metrics_sockets = [] if edge.metrics_port is None else _listen(edge.host, edge.metrics_port)
    url = _url(edge, sockets)
    door, metrics_door = _Door(edge), _Door(edge)
    server, metrics_server = make_server(door, most_connections()), make_server(metrics_door, MOST_SCRAPERS)
    serving = asyncio.ensure_future(server.serve(sockets=sockets))
    serving_metrics = asyncio.ensure_future(metrics_server.serve(sockets=metrics_sockets)) if metrics_sockets else None
    starting: asyncio.Future[AsyncLLMServer] = asyncio.ensure_future(
        AsyncLLMServer.start(config) if engine_address is None else AsyncLLMServer.connect(engine_address, key_file=key_file)
    )
    given_up: asyncio.Future[EngineDeadError] | None = None
    with _signals(server) as (ending, ending_now):
        try:
            await asyncio.wait((serving, starting, ending), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                engine = starting.result()
                door.app = frontend.create_app(engine, options)
                metrics_door.app = metrics_app(engine, edge)
                collect_seldom()
                print(f"Serving {engine.model_info.model} at {url}", flush=True)
                if metrics_sockets:
                    print(f"Metrics at {_url(edge, metrics_sockets)}/metrics", flush=True)
                given_up = asyncio.ensure_future(engine.given_up())
                await asyncio.wait((serving, ending, given_up), return_when=asyncio.FIRST_COMPLETED)
                end_s = time.monotonic() + edge.drain_timeout
                draining = asyncio.ensure_future(engine.drain(edge.drain_timeout))
                await asyncio.wait((serving, draining, ending_now), return_when=asyncio.FIRST_COMPLETED)
                draining.cancel()
                # What the engine has finished may not have been sent yet, to a client that reads slowly.
                left_s = 0.0 if ending_now.done() else max(0.0, end_s - time.monotonic())
                server.config.timeout_graceful_shutdown = math.ceil(left_s) + LAST_WORD_S
                server.should_exit = True
                await asyncio.wait((serving, ending_now), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            server.should_exit = True
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            if not starting.cancelled() and starting.exception() is None:
                await starting.result().close()  # Answers that still run thereby end with an error of their own.
            await asyncio.gather(serving, return_exceptions=True)
            if serving_metrics is not None:
                metrics_server.should_exit = True
                await asyncio.gather(serving_metrics, return_exceptions=True)
    serving.result()
    if given_up is not None and not given_up.cancel():
        raise given_up.result()


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


@contextlib.contextmanager
def _signals(server: Any) -> Iterator[tuple[asyncio.Future[None], asyncio.Future[None]]]:
    """SIGINT and SIGTERM end the server: the first when running answers are done, the second at once.

    Yields:
        What is done with the first, and with the second.
    """
    loop = asyncio.get_running_loop()
    ending, ending_now = loop.create_future(), loop.create_future()

    def end() -> None:
        if not ending.done():
            ending.set_result(None)
        elif not ending_now.done():
            server.force_exit = server.should_exit = True
            ending_now.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    try:
        yield ending, ending_now
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
