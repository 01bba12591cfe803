"""The OpenAI-compatible frontend: its options, its routes, and which part answers each.

It sees an `AsyncLLMServer` with texts and token ids; it knows neither scheduler nor model, nor how it is started.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from cacheflow.asgi import read_json_object, while_connected
from cacheflow.config import option
from cacheflow.edge import EdgeOptions, Guard
from cacheflow.interfaces import CONTRACT_VERSION
from cacheflow.status import StatusRoutes
from cacheflow.text.chat_template import ChatTemplate
from cacheflow_openai import chat, completions, errors, responses
from cacheflow_openai.chat_schema import parse_chat
from cacheflow_openai.embeddings import embed, parse_embedding
from cacheflow_openai.events import EventStream
from cacheflow_openai.fields import given, string
from cacheflow_openai.models import model_card
from cacheflow_openai.openapi import openapi_document
from cacheflow_openai.responses_schema import parse_response
from cacheflow_openai.schema import parse
from cacheflow_openai.tokens import DETOKENIZE_FIELDS, TOKENIZE_FIELDS, detokenize, tokenize

if TYPE_CHECKING:
    from cacheflow import AsyncLLMServer

IGNORED_FIELDS_HEADER = "x-cacheflow-ignored-fields"
MAX_IGNORED_SHOWN = 20
MAX_NAME_SHOWN = 64


@dataclass(frozen=True, kw_only=True)
class OpenAIOptions(EdgeOptions):
    """The options of the OpenAI-compatible frontend."""

    served_model_name: tuple[str, ...] = option(
        (), "What clients call the model; answers have the first of several names. Default: its name."
    )


class OpenAIFrontend:
    """OpenAI's API on port 8000: completions, chats, responses, embeddings.

    All of them are of the one model that the engine serves. Beside them are `/tokenize`, `/detokenize`, `/version`, and the
    routes about the server itself.
    """

    CONTRACT_VERSION: ClassVar[int] = CONTRACT_VERSION
    options: ClassVar[type[OpenAIOptions]] = OpenAIOptions

    @staticmethod
    def create_app(engine: AsyncLLMServer, options: OpenAIOptions) -> Guard:
        """The ASGI application."""
        # No /docs and /redoc: these pages would fetch scripts from other hosts.
        app = FastAPI(title="cacheflow", docs_url=None, redoc_url=None, redirect_slashes=False)
        names = options.served_model_name or (engine.model_info.model,)
        app.openapi = lambda: openapi_document(options, names)  # type: ignore[method-assign] # as FastAPI documents it
        errors.install(app)
        _Routes(engine, names, options.max_body_bytes).add_to(app)
        return Guard(StatusRoutes(app, engine), options)


class _Routes:
    """What is answered on each path."""

    def __init__(self, engine: AsyncLLMServer, names: Sequence[str], max_body_bytes: int) -> None:
        self._engine = engine
        self._model = names[0]
        self._max_body_bytes = max_body_bytes
        created = int(time.time())
        self._cards = {name: model_card(engine.model_info, name, created) for name in names}
        self._template = ChatTemplate(engine.model_info.tokenizer)

    def add_to(self, app: FastAPI) -> None:
        """Has `app` call the methods below."""
        reading = ["GET", "HEAD"]
        app.api_route("/version", methods=reading)(self.show_version)
        app.api_route("/v1/models", methods=reading)(self.list_models)
        app.api_route("/v1/models/{name:path}", methods=reading)(self.show_model)
        app.post("/v1/completions")(self.create_completion)
        app.post("/v1/chat/completions")(self.create_chat_completion)
        app.post("/v1/responses")(self.create_response)
        app.post("/v1/embeddings")(self.create_embedding)
        app.post("/tokenize")(self.tokenize)
        app.post("/detokenize")(self.detokenize)

    async def show_version(self) -> dict[str, str]:
        return {"version": version("cacheflow-openai"), "engine_version": self._engine.model_info.engine_version}

    async def list_models(self) -> dict[str, Any]:
        return {"object": "list", "data": list(self._cards.values())}

    async def show_model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._cards[name]

    async def create_completion(self, request: Request) -> Response:
        asked = parse(await self._read(request))
        self._check_model(asked.model)
        answered = (self._engine, asked, self._model, request.state.request_id)
        if asked.stream:
            return await _start(request, completions.stream(*answered), asked.ignored)
        return await _finish(request, completions.complete(*answered), asked.ignored)

    async def create_chat_completion(self, request: Request) -> Response:
        asked = parse_chat(await self._read(request))
        self._check_model(asked.model)
        answered = (self._engine, self._template, asked, self._model, request.state.request_id)
        if asked.stream:
            return await _start(request, chat.stream(*answered), asked.ignored)
        return await _finish(request, chat.complete(*answered), asked.ignored)

    async def create_response(self, request: Request) -> Response:
        asked = parse_response(await self._read(request))
        self._check_model(asked.chat.model)
        answered = (self._engine, self._template, asked, self._model, request.state.request_id)
        if asked.chat.stream:
            return await _start(request, responses.stream(*answered), asked.chat.ignored, is_named=True)
        return await _finish(request, responses.respond(*answered), asked.chat.ignored)

    async def create_embedding(self, request: Request) -> Response:
        asked = parse_embedding(await self._read(request))
        self._check_model(asked.model)
        return await _finish(request, embed(self._engine, asked, self._model, request.state.request_id), asked.ignored)

    async def tokenize(self, request: Request) -> Response:
        document = await self._read(request)
        self._check_model(string(given(document), "model"))
        ignored = [name for name in document if name not in TOKENIZE_FIELDS]
        return await _finish(request, tokenize(self._engine, self._template, document), ignored)

    async def detokenize(self, request: Request) -> Response:
        document = await self._read(request)
        self._check_model(string(given(document), "model"))
        ignored = [name for name in document if name not in DETOKENIZE_FIELDS]
        return await _finish(request, detokenize(self._engine, document), ignored)

    async def _read(self, request: Request) -> dict[str, Any]:
        media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if media_type != "application/json" and not media_type.endswith("+json"):
            raise HTTPException(415, f"The content type must be application/json, got {media_type[:MAX_NAME_SHOWN]!r}")
        return await read_json_object(request.receive, self._max_body_bytes)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self._cards:
            served = ", ".join(map(repr, self._cards))
            raise errors.UnknownModelError(f"The model {name[:MAX_NAME_SHOWN]!r} does not exist here. Served: {served}.")


async def _start(
    request: Request, values: AsyncGenerator[dict[str, Any], None], ignored: list[str], *, is_named: bool = False
) -> Response:
    """Answers with a stream. Its first value is awaited here, so that a request that is refused gets its status."""
    first = await while_connected(request.receive, anext(values))
    return EventStream(first, values, _ignored_fields(ignored), is_named=is_named)


async def _finish(request: Request, answer: Awaitable[dict[str, Any]], ignored: list[str]) -> Response:
    """Answers with one object."""
    return JSONResponse(await while_connected(request.receive, answer), headers=_ignored_fields(ignored))


def _ignored_fields(names: list[str]) -> dict[str, str]:
    """The header that names them, in characters that a header may have; it may not end in a space."""
    shown = [quote(name[:MAX_NAME_SHOWN], safe="") or '""' for name in names[:MAX_IGNORED_SHOWN]]
    return {IGNORED_FIELDS_HEADER: ", ".join(shown)} if shown else {}
