"""The OpenAI-compatible frontend: its routes, and what is written to the wire.

It sees an `AsyncLLMServer` with texts and token ids; it knows neither scheduler nor model, nor how it is started.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from cacheflow.asgi import answer_for, error_document, read_json_object, send_stream, while_connected
from cacheflow.config import option, validate_options
from cacheflow.errors import CacheflowError
from cacheflow.interfaces import CONTRACT_VERSION
from cacheflow_openai import errors
from cacheflow_openai.completions import complete, stream
from cacheflow_openai.models import model_card
from cacheflow_openai.schema import parse

if TYPE_CHECKING:
    from cacheflow import AsyncLLMServer

logger = logging.getLogger(__name__)

IGNORED_FIELDS_HEADER = "x-cacheflow-ignored-fields"
MAX_IGNORED_SHOWN = 20
MAX_NAME_SHOWN = 64


@dataclass(frozen=True, kw_only=True)
class OpenAIOptions:
    """The options of the OpenAI-compatible frontend.

    Raises:
        ConfigError: A value out of range.
    """

    host: str = option("localhost", "The address to listen on.")
    port: int = option(8000, "The port to listen on; 0 takes a free one.", minimum=0, maximum=65535)
    served_model_name: str | None = option(None, "What clients call the model. Default: its name.")
    max_body_bytes: int = option(8 * 2**20, "The largest request body.", minimum=1024, unit="bytes")
    allow_credentials: bool = option(False, "Browsers may send cookies and such along (CORS).")
    allowed_origins: tuple[str, ...] = option(
        (), "Web pages of these origins may call (CORS): a JSON list or separated by commas; * is all. Default: none."
    )
    allowed_methods: tuple[str, ...] = option(("*",), "With these HTTP methods.")
    allowed_headers: tuple[str, ...] = option(("*",), "With these HTTP headers.")

    def __post_init__(self) -> None:
        validate_options(self)


class OpenAIFrontend:
    """OpenAI's `/v1/models` and `/v1/completions` on port 8000."""

    CONTRACT_VERSION: ClassVar[int] = CONTRACT_VERSION
    options: ClassVar[type[OpenAIOptions]] = OpenAIOptions

    @staticmethod
    def create_app(engine: AsyncLLMServer, options: OpenAIOptions) -> FastAPI:
        """The ASGI application."""
        # No /docs and /redoc: these pages would fetch scripts from other hosts.
        app = FastAPI(title="cacheflow", docs_url=None, redoc_url=None)
        if options.allowed_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=options.allowed_origins,
                allow_credentials=options.allow_credentials,
                allow_methods=options.allowed_methods,
                allow_headers=options.allowed_headers,
            )
        errors.install(app)
        model = options.served_model_name or engine.model_info.model
        card = model_card(engine.model_info, model, int(time.time()))

        def check_model(name: str | None) -> None:
            if name is not None and name != model:
                raise errors.UnknownModelError(f"The model {name[:MAX_NAME_SHOWN]!r} does not exist here. Served: {model!r}.")

        @app.get("/health")
        async def health() -> dict[str, str]:
            return {"status": "alive"}

        @app.get("/health/ready")
        async def ready() -> Response:
            if engine.is_ready:
                return JSONResponse({"status": "ready"})
            return JSONResponse(error_document("The engine is not ready.", "server_error", code="not_ready"), 503)

        @app.get("/v1/models")
        async def list_models() -> dict[str, Any]:
            return {"object": "list", "data": [card]}

        @app.get("/v1/models/{name:path}")
        async def show_model(name: str) -> dict[str, Any]:
            check_model(name)
            return card

        @app.post("/v1/completions")
        async def create_completion(request: Request) -> Response:
            _check_media_type(request)
            asked = parse(await read_json_object(request.receive, options.max_body_bytes))
            check_model(asked.model)
            headers = _ignored_fields(asked.ignored)
            if not asked.stream:
                answer = await while_connected(request.receive, complete(engine, asked, model))
                return JSONResponse(answer, headers=headers)
            chunks = stream(engine, asked, model)
            # The first chunk is awaited here, so that a request that is refused gets its status and no stream.
            first = await while_connected(request.receive, anext(chunks))
            return EventStream(first, chunks, headers)

        return app


class EventStream(Response):
    """Server-sent events: one chunk each, then "[DONE]". An error in the middle is an event too."""

    def __init__(self, first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None], headers: dict[str, str]) -> None:
        self.first = first
        self.rest = rest
        self.own_headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **headers}
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events; ends the request when the client hangs up."""
        await send_stream(receive, send, self._events(), self.own_headers)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self.rest):
            try:
                yield _event(self.first)
                async for chunk in self.rest:
                    yield _event(chunk)
            except Exception as error:
                if not isinstance(error, CacheflowError):
                    logger.exception("A stream failed.")
                yield _event(answer_for(error).document)
            yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    # ASCII only: some clients take U+2028 for the end of a line.
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _check_media_type(request: Request) -> None:
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise HTTPException(415, f"The content type must be application/json, got {media_type[:MAX_NAME_SHOWN]!r}")


def _ignored_fields(names: list[str]) -> dict[str, str]:
    """The header that names them, in characters that a header may have."""
    shown = [quote(name[:MAX_NAME_SHOWN], safe="") for name in names[:MAX_IGNORED_SHOWN]]
    return {IGNORED_FIELDS_HEADER: ", ".join(shown)} if shown else {}
