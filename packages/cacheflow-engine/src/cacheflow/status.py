"""The routes about a server itself, the same for every HTTP frontend: health, metrics, readings of the engine.

Plain ASGI, so it needs no web framework. It knows an engine as an `AsyncLLMServer`, and of the routes beside its own nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Collection, MutableMapping
from typing import TYPE_CHECKING, Any

from cacheflow.asgi import App, ErrorAnswer, Receive, Send, answer_for, error_document, send_answer, send_error
from cacheflow.edge import EdgeOptions, Guard
from cacheflow.errors import CacheflowError

if TYPE_CHECKING:
    from cacheflow.async_server import AsyncLLMServer

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
JSON_TYPE = "application/json"
READING_TIMEOUT_S = 10.0
"""How long the engine has for a reading; it gives them between two steps."""

PATHS = ("/health", "/health/ready", "/metrics", "/stats", "/stats/view")
OPEN_PATHS = ("/health", "/health/ready", "/metrics")
"""Those of a metrics port, where they need no key."""


class StatusRoutes:
    """An ASGI application that answers `GET` on `paths` and passes everything else on to `app`.

    `/health` is 200 while the process lives, `/health/ready` only while it takes requests; `/metrics` is for Prometheus;
    `/stats` and `/stats/view` are the same and more as JSON, for people's programs.
    """

    def __init__(self, app: App, engine: AsyncLLMServer, paths: Collection[str] = PATHS) -> None:
        self._app = app
        self._engine = engine
        self._paths = paths

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answers the request, or has `app` answer it."""
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else None
        if path not in self._paths:
            await self._app(scope, receive, send)
            return
        if scope["method"] not in ("GET", "HEAD"):
            message = f"{scope['method']} {path}: only GET is possible."
            document = error_document(message, "invalid_request_error", code="method_not_allowed")
            await send_error(send, ErrorAnswer(405, document, {"allow": "GET, HEAD"}))
            return
        if scope["method"] == "HEAD":
            send = _without_body(send)
        try:
            if path == "/metrics":
                await send_answer(send, 200, METRICS_TYPE, await self._engine.metrics.exposition(self._engine))
            elif path == "/health/ready" and (reason := self._why_not_ready()) is not None:
                document = error_document(reason, "server_error", code="not_ready")
                await send_error(send, ErrorAnswer(503, document, {"retry-after": "1"}))
            else:
                await send_answer(send, 200, JSON_TYPE, json.dumps(await self._reading(path)).encode())
        except CacheflowError as error:
            await send_error(send, answer_for(error))
        except asyncio.TimeoutError:
            message = f"The engine gave no reading within {READING_TIMEOUT_S:g} s: its step takes longer. Try again later."
            await send_error(send, ErrorAnswer(503, error_document(message, "server_error", code="engine_unavailable")))

    def _why_not_ready(self) -> str | None:
        if self._engine.is_draining:
            return "The server is ending: running answers are finished, no new requests are taken."
        return None if self._engine.is_ready else "The engine is not ready."

    async def _reading(self, path: str | None) -> Any:
        engine = self._engine
        if path == "/stats":
            stats = await asyncio.wait_for(engine.stats(), READING_TIMEOUT_S)
            return {"model": engine.model_info.model, "engine": dataclasses.asdict(stats), "latency": engine.metrics.summary()}
        if path == "/stats/view":
            return dataclasses.asdict(await asyncio.wait_for(engine.view(), READING_TIMEOUT_S))
        return {"status": "ready" if path == "/health/ready" else "alive"}


def metrics_app(engine: AsyncLLMServer, options: EdgeOptions) -> Guard:
    """What a metrics port serves: `OPEN_PATHS` without a key, and nothing else."""
    return Guard(StatusRoutes(_answer_not_here, engine, OPEN_PATHS), options, OPEN_PATHS)


async def _answer_not_here(scope: Any, receive: Receive, send: Send) -> None:
    document = error_document(f"Only {', '.join(OPEN_PATHS)} are here.", "invalid_request_error", code="not_found")
    await send_error(send, ErrorAnswer(404, document))


def _without_body(send: Send) -> Send:
    async def send_head(message: MutableMapping[str, Any]) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return send_head
