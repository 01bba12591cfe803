"""Every error as OpenAI's clients expect it: `{"error": {"message", "type", "param", "code"}}` with the right status."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from cacheflow.asgi import ErrorAnswer, answer_for, error_document
from cacheflow.errors import CacheflowError, InvalidRequestError


class UnknownModelError(InvalidRequestError):
    """A model that is not the one served."""


class ContextLengthError(InvalidRequestError):
    """A prompt, with the tokens asked for behind it, that the context has no room for."""


def answer(error: Exception) -> ErrorAnswer:
    """How `error` is told, with the codes that OpenAI gives to some."""
    if isinstance(error, UnknownModelError):
        return ErrorAnswer(404, error_document(str(error), "invalid_request_error", "model", "model_not_found"))
    if isinstance(error, ContextLengthError):
        return ErrorAnswer(400, error_document(str(error), "invalid_request_error", error.param, "context_length_exceeded"))
    return answer_for(error)


def install(app: FastAPI) -> None:
    """Makes `app` answer every exception in this shape."""
    app.add_exception_handler(CacheflowError, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer)


async def _answer(request: Request, error: Exception) -> Response:
    told = answer(error)
    return JSONResponse(told.document, told.status, headers=told.headers)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}."
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    document = error_document(message, "invalid_request_error", code=code)
    return JSONResponse(document, error.status_code, headers=error.headers)
