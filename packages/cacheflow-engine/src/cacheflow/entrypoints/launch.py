"""Starts a frontend as a process of its own: options, engine, HTTP server, and an orderly end.

It owns the life of the process; ports and connections are `http_server`'s. It knows frontends only as members of the
`cacheflow.frontends` group, and no route of theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cacheflow.config import EngineConfig, flag_of
from cacheflow.edge import EdgeOptions
from cacheflow.entrypoints.gone import refuse_gone_options
from cacheflow.entrypoints.options import build, options_from
from cacheflow.errors import CacheflowError, EngineDeadError, PluginError
from cacheflow.interfaces import Frontend
from cacheflow.plugins import find_plugins, load_plugin
from cacheflow.status import metrics_app

if TYPE_CHECKING:
    from cacheflow.async_server import AsyncLLMServer
    from cacheflow.entrypoints.http_server import HttpServer

GROUP = "cacheflow.frontends"
PACKAGES = {"simple": "cacheflow-server", "openai": "cacheflow-openai"}


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
    from cacheflow.async_server import AsyncLLMServer
    from cacheflow.entrypoints.http_server import MOST_SCRAPERS, HttpServer, allow_many_connections, most_connections
    from cacheflow.entrypoints.turns import collect_seldom
    from cacheflow.service.short_turns import take_short_turns

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("cacheflow").setLevel(logging.INFO)
    # A frontend of others may have options of its own; it is guarded while the engine loads, and itself from then on.
    edge = options if isinstance(options, EdgeOptions) else EdgeOptions(host=options.host, port=options.port)
    allow_many_connections()
    take_short_turns()
    server = HttpServer(edge, edge.port, most_connections())
    metrics_server = None if edge.metrics_port is None else HttpServer(edge, edge.metrics_port, MOST_SCRAPERS)
    serving = server.start()
    serving_metrics = None if metrics_server is None else metrics_server.start()
    starting: asyncio.Future[AsyncLLMServer] = asyncio.ensure_future(
        AsyncLLMServer.start(config) if engine_address is None else AsyncLLMServer.connect(engine_address, key_file=key_file)
    )
    given_up: asyncio.Future[EngineDeadError] | None = None
    with _signals(server) as (ending, ending_now):
        try:
            await asyncio.wait((serving, starting, ending), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                engine = starting.result()
                server.app = frontend.create_app(engine, options)
                collect_seldom()
                print(f"Serving {engine.model_info.model} at {server.url}", flush=True)
                if metrics_server is not None:
                    metrics_server.app = metrics_app(engine, edge)
                    print(f"Metrics at {metrics_server.url}/metrics", flush=True)
                given_up = asyncio.ensure_future(engine.given_up())
                await asyncio.wait((serving, ending, given_up), return_when=asyncio.FIRST_COMPLETED)
                await _drain(engine, server, edge.drain_timeout, serving, ending_now)
        finally:
            server.end()
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            if not starting.cancelled() and starting.exception() is None:
                await starting.result().close()  # Answers that still run thereby end with an error of their own.
            await asyncio.gather(serving, return_exceptions=True)
            if metrics_server is not None and serving_metrics is not None:
                metrics_server.end()
                await asyncio.gather(serving_metrics, return_exceptions=True)
    serving.result()
    if given_up is not None and not given_up.cancel():
        raise given_up.result()


async def _drain(
    engine: AsyncLLMServer,
    server: HttpServer,
    timeout_s: float,
    serving: asyncio.Future[None],
    ending_now: asyncio.Future[None],
) -> None:
    """Lets what runs finish, unless either future is done: the engine its requests, then the server its answers."""
    end_s = time.monotonic() + timeout_s
    draining = asyncio.ensure_future(engine.drain(timeout_s))
    await asyncio.wait((serving, draining, ending_now), return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    # What the engine has finished may not have been sent yet, to a client that reads slowly.
    left_s = 0.0 if ending_now.done() else max(0.0, end_s - time.monotonic())
    server.end(left_s)
    await asyncio.wait((serving, ending_now), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)


@contextlib.contextmanager
def _signals(server: HttpServer) -> Iterator[tuple[asyncio.Future[None], asyncio.Future[None]]]:
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
            server.end_now()
            ending_now.set_result(None)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    try:
        yield ending, ending_now
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
