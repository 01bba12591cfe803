"""What every HTTP frontend needs beside its own routes: bounded bodies, a watch on the client, one shape of error.

Works on ASGI's `receive` alone, so it needs no web framework; third-party frontends may use it too. It knows no routes, no
engine, and no schema but that of `SamplingParams`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cacheflow.errors import CacheflowError, EngineDeadError, EngineDrainingError, EngineOverloadedError, InvalidRequestError
from cacheflow.types import SamplingParams

logger = logging.getLogger(__name__)

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]


class ClientGoneError(CacheflowError):
    """The client hung up before its answer was complete."""


class BodyTooLargeError(InvalidRequestError):
    """A request body of more than `max_bytes`. Answered with 413."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"The request body is over {max_bytes} bytes. Send fewer or shorter prompts at a time.")


class BodyTimeoutError(InvalidRequestError):
    """A request body that was not there within `timeout_s`. Answered with 408."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"The request body did not arrive within {timeout_s:g} s.")


@dataclass(frozen=True)
class ErrorAnswer:
    """How an error is told over HTTP.

    Attributes:
        status: The status code.
        document: `{"error": {"message", "type", "param", "code"}}`.
        headers: To go with it.
    """

    status: int
    document: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def error_document(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of every error answer."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer_for(error: Exception) -> ErrorAnswer:
    """The answer to a request that ended in `error`. What is not ours is told without its text, which may hold internals."""
    text = str(error)
    if isinstance(error, ClientGoneError):
        return ErrorAnswer(499, error_document(text, "invalid_request_error", code="client_gone"))
    if isinstance(error, BodyTimeoutError):
        document = error_document(text, "invalid_request_error", code="request_timeout")
        return ErrorAnswer(408, document, {"connection": "close"})  # Its rest may come yet, which is no next request.
    if isinstance(error, InvalidRequestError):
        status = 413 if isinstance(error, BodyTooLargeError) else 400
        return ErrorAnswer(status, error_document(text, "invalid_request_error", error.param))
    if isinstance(error, EngineOverloadedError):
        retry = {"retry-after": str(math.ceil(error.retry_after_s))}
        code = "draining" if isinstance(error, EngineDrainingError) else "overloaded"
        return ErrorAnswer(503, error_document(text, "server_error", code=code), retry)
    if isinstance(error, EngineDeadError):
        return ErrorAnswer(503, error_document(text, "server_error", code="engine_unavailable"))
    if isinstance(error, CacheflowError):
        return ErrorAnswer(500, error_document(text, "server_error", code="request_failed"))
    return ErrorAnswer(500, error_document("Internal error; the server's log has the details.", "server_error"))


async def send_answer(
    send: Send, status: int, content_type: str, body: bytes, headers: Mapping[str, str] | None = None
) -> None:
    """Answers a request as a whole."""
    named = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
    raw_headers = [(name.encode(), value.encode("latin-1")) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw_headers})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, answer: ErrorAnswer) -> None:
    """Answers a request with an error."""
    await send_answer(send, answer.status, "application/json", json.dumps(answer.document).encode(), answer.headers)


async def read_json_object(receive: Receive, max_bytes: int) -> dict[str, Any]:
    """Reads the body and parses it as a JSON object, whatever its content type says.

    Raises:
        BodyTooLargeError: It has more than `max_bytes`.
        InvalidRequestError: It is not a JSON object in UTF-8.
        ClientGoneError: The client hung up.
    """
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError("The client hung up while it sent its request.")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > max_bytes:
            raise BodyTooLargeError(max_bytes)
    try:
        text = body.decode("utf-8-sig")
        document = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            # JSON can write half of a surrogate pair ("\ud800"), which is no character and can't be encoded again.
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequestError(f"The request body is not valid JSON: {reason}.") from error
    if not isinstance(document, dict):
        raise InvalidRequestError(f"The request body must be a JSON object, got {type(document).__name__}.")
    return document


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """Makes the parameters from JSON values, whose objects can only have strings as keys.

    Raises:
        InvalidRequestError: A value is out of its range.
    """
    bias = values.get("logit_bias")
    if isinstance(bias, dict) and all(key.isascii() and key.isdigit() and len(key) < 20 for key in bias):
        values = {**values, "logit_bias": {int(key): value for key, value in bias.items()}}
    return SamplingParams(**values)


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Runs `work` and cancels it as soon as the client is gone. The request's body must have been read.

    Raises:
        ClientGoneError: The client hung up first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError("The client hung up before its answer was complete.")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        # Not left before the work has let go of its request, so that the engine is told now.
        await asyncio.gather(task, gone, return_exceptions=True)


async def send_stream(receive: Receive, send: Send, parts: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
    """Answers with `parts` as they come. When the client hangs up, or all are sent, `parts` is closed before this returns."""

    async def pump() -> None:
        async with aclosing(parts):
            raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
            async for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    with suppress(ClientGoneError):
        await while_connected(receive, pump())


async def encoded(
    first: T,
    rest: AsyncGenerator[T, None],
    encode: Callable[[T], bytes],
    encode_error: Callable[[dict[str, Any]], bytes],
    end: bytes = b"",
) -> AsyncGenerator[bytes, None]:
    """The parts of a stream, for `send_stream`. An error in the middle is the last part but `end`; `rest` is closed.

    Args:
        first: Its first value, awaited before the stream was begun, so that a request that is refused gets its status.
        rest: Those behind it.
        encode: Makes a part of a value.
        encode_error: Makes a part of an error's document.
        end: What comes last of all, if anything.
    """
    async with aclosing(rest):
        try:
            yield encode(first)
            async for value in rest:
                yield encode(value)
        except Exception as error:
            if not isinstance(error, CacheflowError):
                logger.exception("A stream failed.")
            yield encode_error(answer_for(error).document)
        if end:
            yield end


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
