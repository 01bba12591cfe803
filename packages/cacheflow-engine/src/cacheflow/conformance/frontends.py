"""Conformance of `cacheflow.frontends`: options that become a command line, and an application that answers.

The application is made over a real engine with a tiny model, and asked by its ASGI interface, without a socket. Says nothing
about a frontend's routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cacheflow.conformance.tiny_model import write_tiny_model
from cacheflow.conformance.verdict import ConformanceFailure, expect


def check_options_become_a_command_line(plugin: Any, name: str) -> None:
    """`options` is a frozen dataclass of `cacheflow.config.option` fields with `host` and `port`, all with defaults."""
    options = plugin.options
    expect(is_dataclass(options) and isinstance(options, type), f"options must be a dataclass, got {options!r}")
    names = {entry.name for entry in fields(options)}
    for required in ("host", "port"):
        expect(required in names, f"options must have a field {required!r}, it has {sorted(names)}")
    for entry in fields(options):
        expect("help" in entry.metadata, f"options.{entry.name} must be made with cacheflow.config.option")
        expect(entry.metadata["help"].strip(), f"options.{entry.name} has no help text")
    made = options()
    try:
        made.port = made.port
    except FrozenInstanceError:
        pass
    else:
        raise ConformanceFailure("options must be a frozen dataclass; its fields can be set")
    expect(
        isinstance(made.port, int) and 0 <= made.port < 65536, f"the default port must be from 0 to 65535, got {made.port!r}"
    )


def check_options_do_not_hide_the_engine(plugin: Any, name: str) -> None:
    """No option has the name of one of the engine's, which stand beside it on the command line."""
    from cacheflow.config import EngineConfig

    engine = {entry.name for entry in fields(EngineConfig)}
    for entry in fields(plugin.options):
        expect(entry.name not in engine, f"options.{entry.name} has the name of an option of the engine")


def check_application_answers(plugin: Any, name: str) -> None:
    """`create_app` gives an ASGI application that answers an unknown path with a client error, and outlives it."""
    with TemporaryDirectory() as folder:
        asyncio.run(_serve_once(plugin, Path(folder)))


async def _serve_once(plugin: Any, folder: Path) -> None:
    from cacheflow.async_server import AsyncLLMServer

    engine = await AsyncLLMServer.start(write_tiny_model(folder))
    try:
        app = plugin.create_app(engine, plugin.options())
        expect(callable(app), f"create_app must return an ASGI application, got {type(app).__name__}")
        for _ in range(2):
            status = await _get(app, "/a-path-that-no-frontend-has")
            expect(400 <= status < 500, f"an unknown path must be answered with a client error, got status {status}")
    finally:
        await engine.close()


async def _get(app: Any, path: str) -> int:
    """The status of a GET; fails unless the answer is complete."""
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    kinds = [message["type"] for message in sent]
    is_complete = bool(kinds) and kinds[0] == "http.response.start" and not sent[-1].get("more_body", False)
    expect(is_complete and len(kinds) > 1, f"an answer is a start and a body, got {kinds}")
    return int(sent[0]["status"])


CHECKS = (check_options_become_a_command_line, check_options_do_not_hide_the_engine, check_application_answers)
