"""The simple frontend: `POST /generate` and the health checks. It owns the routes and what is written to the wire.

It sees an `AsyncLLMServer` with texts and token ids; it knows neither scheduler nor model, nor how it is started.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from cacheflow.asgi import answer_for, error_document, read_json_object, send_stream, while_connected
from cacheflow.config import option, validate_options
from cacheflow.errors import CacheflowError, RequestFailedError
from cacheflow.interfaces import CONTRACT_VERSION
from cacheflow_server.schema import GenerateRequest, parse

if TYPE_CHECKING:
    from cacheflow import AsyncLLMServer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SimpleOptions:
    """The options of the simple frontend.

    Raises:
        ConfigError: A value out of range.
    """

    host: str = option("localhost", "The address to listen on.")
    port: int = option(8001, "The port to listen on; 0 takes a free one.", minimum=0, maximum=65535)
    max_body_bytes: int = option(8 * 2**20, "The largest request body.", minimum=1024, unit="bytes")
    allow_credentials: bool = option(False, "Browsers may send cookies and such along (CORS).")
    allowed_origins: tuple[str, ...] = option(
        (), "Web pages of these origins may call (CORS): a JSON list or separated by commas; * is all. Default: none."
    )
    allowed_methods: tuple[str, ...] = option(("*",), "With these HTTP methods.")
    allowed_headers: tuple[str, ...] = option(("*",), "With these HTTP headers.")

    def __post_init__(self) -> None:
        validate_options(self)


class SimpleFrontend:
    """`POST /generate` on port 8001, in the `cacheflow.frontends` group under the name "simple"."""

    CONTRACT_VERSION: ClassVar[int] = CONTRACT_VERSION
    options: ClassVar[type[SimpleOptions]] = SimpleOptions

    @staticmethod
    def create_app(engine: AsyncLLMServer, options: SimpleOptions) -> FastAPI:
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

        @app.get("/health")
        async def health() -> dict[str, str]:
            return {"status": "alive"}

        @app.get("/health/ready")
        async def ready() -> Response:
            if engine.is_ready:
                return JSONResponse({"status": "ready"})
            return JSONResponse(error_document("The engine is not ready.", "server_error", code="not_ready"), 503)

        @app.post("/generate")
        async def generate(request: Request) -> Response:
            asked = parse(await read_json_object(request.receive, options.max_body_bytes))
            texts = _texts(engine, asked)
            if not asked.stream:
                return JSONResponse({"text": await while_connected(request.receive, _last(texts))})
            # The first texts are awaited here, so that a request that is refused gets its status and no stream.
            first = await while_connected(request.receive, anext(texts))
            return TextStream(first, texts)

        app.add_exception_handler(HTTPException, _answer_http)
        app.add_exception_handler(CacheflowError, _answer)
        app.add_exception_handler(Exception, _answer)
        return app


class TextStream(Response):
    """JSON documents, each ended by a NUL byte and with the whole texts so far. An error in the middle is the last one."""

    def __init__(self, first: list[str], rest: AsyncGenerator[list[str], None]) -> None:
        self.first = first
        self.rest = rest
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the documents; ends the request when the client hangs up."""
        await send_stream(receive, send, self._documents(), {"content-type": "application/json"})

    async def _documents(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self.rest):
            try:
                yield _document({"text": self.first})
                async for texts in self.rest:
                    yield _document({"text": texts})
            except Exception as error:
                if not isinstance(error, CacheflowError):
                    logger.exception("A stream failed.")
                yield _document(answer_for(error).document)


def _document(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\0"


async def _texts(engine: AsyncLLMServer, asked: GenerateRequest) -> AsyncGenerator[list[str], None]:
    """The prompt with each sequence's text so far, whenever one has grown."""
    prompt = asked.prompt if isinstance(asked.prompt, str) else None
    async with aclosing(engine.generate(asked.prompt, asked.params)) as outputs:
        async for output in outputs:
            if output.error is not None:
                raise RequestFailedError(output.error)
            if prompt is None:
                prompt = engine.tokenizer.decode(output.prompt_token_ids)
            if output.outputs:
                yield [prompt + sequence.text for sequence in output.outputs]


async def _last(texts: AsyncGenerator[list[str], None]) -> list[str]:
    final: list[str] = []
    async for so_far in texts:
        final = so_far
    return final


async def _answer(request: Request, error: Exception) -> Response:
    answer = answer_for(error)
    return JSONResponse(answer.document, answer.status, headers=answer.headers)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = f"There is no {request.url.path}. Texts are generated by POST /generate."
    else:
        message = f"{request.method} {request.url.path}: {error.detail}."
    document = error_document(message, "invalid_request_error", code=error.detail.lower().replace(" ", "_"))
    return JSONResponse(document, error.status_code, headers=error.headers)
