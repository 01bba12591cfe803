"""The messages between a client and the engine process.

MessagePack by msgspec over ZeroMQ (ROUTER in the engine, DEALER in each client), one message a frame; nothing is ever
unpickled. It owns what a message looks like and how large it may be; it knows neither sockets nor engine.

A talk begins with `Hello`, which is answered by `Welcome`, by `Loading` until the model is there, by `LoadFailed`, or by
`Rejected` when the two sides speak different versions. Then the client submits and aborts, says `Ping` so that its lease
does not run out, and gets one `Updates` a step. Who is not known, or no longer, is answered `Unknown`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from cacheflow.errors import (
    CacheflowError,
    CheckpointError,
    ConfigError,
    EngineDeadError,
    EngineDrainingError,
    EngineOverloadedError,
    InvalidRequestError,
    ModelNotFoundError,
    NotEnoughMemoryError,
    PluginError,
    RequestFailedError,
    UnsupportedModelError,
)
from cacheflow.types import EngineRequest, EngineStats, EngineView, ModelInfo, RequestUpdate

PROTOCOL_VERSION = 1
"""Raised by every change that the other side would misread. `Hello` and `Rejected` keep their form for ever."""

MAX_CLIENT_MESSAGE_BYTES = 16 * 2**20
"""Of a message to the engine: a prompt of a million tokens is 5 MB."""
MAX_ENGINE_MESSAGE_BYTES = 128 * 2**20
"""Of a message to a client: the largest `tokenizer.json` in use are about 35 MB."""

PING_INTERVAL_S = 2.0
"""How often a client says that it is still there."""
LEASE_S = 10.0
"""After this long without a word from a client its requests are aborted."""

MAX_EXTRA_DEPTH = 16
MAX_CLIENT_ID_LENGTH = 128


class MalformedMessageError(CacheflowError):
    """Bytes that are not a message of this protocol, or are more than a message may have."""


# From a client to the engine.


class Hello(msgspec.Struct, tag=True, frozen=True):
    """Asks to be served. A client that says it again under the same id takes the place of its older self."""

    protocol_version: int
    client_id: str


class Submit(msgspec.Struct, tag=True, frozen=True):
    """A request. It is packed within the message, so that one that can't be read can still be refused by its id.

    Attributes:
        request_id: Its id.
        request: The packed `EngineRequest`.
        is_again: It was accepted before, by an engine that died: a full waiting room is no reason to lose it.
    """

    request_id: str
    request: msgspec.Raw
    is_again: bool = False


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Ends a request, which is answered with its last update, or one sequence of it, which is not answered.

    Nothing happens when it has ended already.
    """

    request_id: str
    index: int | None = None


class StatsRequest(msgspec.Struct, tag=True, frozen=True):
    """Asks for a `StatsReply`."""


class ViewRequest(msgspec.Struct, tag=True, frozen=True):
    """Asks for a `ViewReply`."""


class Ping(msgspec.Struct, tag=True, frozen=True):
    """Renews the client's lease."""


class Goodbye(msgspec.Struct, tag=True, frozen=True):
    """The client leaves; its unfinished requests are aborted."""


ClientMessage: TypeAlias = Hello | Submit | Abort | StatsRequest | ViewRequest | Ping | Goodbye


# From the engine to a client.


class Loading(msgspec.Struct, tag=True, frozen=True):
    """Not yet: the model is being loaded, since this many seconds."""

    elapsed_s: float


class LoadFailed(msgspec.Struct, tag=True, frozen=True):
    """The model can't be loaded. The engine ends.

    Attributes:
        kind: The error's class, by name.
        error: Its text.
    """

    kind: str
    error: str

    def exception(self) -> CacheflowError:
        """The error as it was raised in the engine process, where it is one of ours."""
        if self.kind in _LOAD_ERRORS:
            return _LOAD_ERRORS[self.kind](self.error)
        return EngineDeadError(f"The engine could not be started: {self.kind}: {self.error}")


class Rejected(msgspec.Struct, tag=True, frozen=True):
    """The client can't be served by this engine at all."""

    error: str


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """The client is known from now on."""

    protocol_version: int
    info: ModelInfo


class Updates(msgspec.Struct, tag=True, frozen=True):
    """What one step did to the client's requests."""

    updates: list[RequestUpdate]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """A request that was not taken in.

    Attributes:
        request_id: The request.
        error: Why.
        is_invalid: It is the request's own fault.
        param: The field at fault, or None.
        retry_after_s: The engine has no room; when it is worth trying again, in seconds. None: for another reason.
        is_draining: It has none because it is ending.
    """

    request_id: str
    error: str
    is_invalid: bool = False
    param: str | None = None
    retry_after_s: float | None = None
    is_draining: bool = False

    def exception(self) -> CacheflowError:
        """The error that the request's caller gets."""
        if self.is_invalid:
            return InvalidRequestError(self.error, param=self.param)
        if self.retry_after_s is not None:
            kind = EngineDrainingError if self.is_draining else EngineOverloadedError
            return kind(self.error, retry_after_s=self.retry_after_s)
        return RequestFailedError(self.error)


class StatsReply(msgspec.Struct, tag=True, frozen=True):
    """The answer to a `StatsRequest`."""

    stats: EngineStats


class ViewReply(msgspec.Struct, tag=True, frozen=True):
    """The answer to a `ViewRequest`; this and `StatsReply` come in the order of asking."""

    view: EngineView


class Draining(msgspec.Struct, tag=True, frozen=True):
    """The engine is ending: it finishes what runs, within some time, and takes nothing new."""


class Unknown(msgspec.Struct, tag=True, frozen=True):
    """Said to whom the engine does not know: it has been restarted, or the client's lease ran out. Time for a `Hello`."""


EngineMessage: TypeAlias = (
    Loading | LoadFailed | Rejected | Welcome | Updates | Refused | StatsReply | ViewReply | Draining | Unknown
)

_LOAD_ERRORS: dict[str, type[CacheflowError]] = {
    error.__name__: error
    for error in (
        CheckpointError,
        ConfigError,
        EngineDeadError,
        ModelNotFoundError,
        NotEnoughMemoryError,
        PluginError,
        UnsupportedModelError,
    )
}

_encoder = msgspec.msgpack.Encoder()
_client_message = msgspec.msgpack.Decoder(ClientMessage)
_engine_message = msgspec.msgpack.Decoder(EngineMessage)
_request = msgspec.msgpack.Decoder(EngineRequest)


def encode_client_message(message: ClientMessage) -> bytes:
    """To bytes. Requests are made into messages by `pack_request`."""
    return _encoder.encode(message)


def encode_engine_message(message: EngineMessage) -> bytes:
    """To bytes.

    Raises:
        MalformedMessageError: They are more than a client takes.
    """
    data = _encoder.encode(message)
    if len(data) > MAX_ENGINE_MESSAGE_BYTES:
        raise MalformedMessageError(
            f"A {type(message).__name__} message has {len(data)} bytes, a client takes {MAX_ENGINE_MESSAGE_BYTES}."
        )
    return data


def decode_client_message(data: bytes) -> ClientMessage:
    """From bytes.

    Raises:
        MalformedMessageError: They are no message to the engine.
    """
    message: ClientMessage = _decode(_client_message, data, MAX_CLIENT_MESSAGE_BYTES)
    return message


def decode_engine_message(data: bytes) -> EngineMessage:
    """From bytes.

    Raises:
        MalformedMessageError: They are no message to a client.
    """
    message: EngineMessage = _decode(_engine_message, data, MAX_ENGINE_MESSAGE_BYTES)
    return message


def pack_request(request: EngineRequest, *, is_again: bool = False) -> bytes:
    """A request as an encoded `Submit`.

    Raises:
        InvalidRequestError: It can't be written as MessagePack, or is too large.
    """
    _check_plain(request.params.extra, "extra")
    try:
        data = _encoder.encode(Submit(request.request_id, msgspec.Raw(_encoder.encode(request)), is_again))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError(f"The request can't be sent to the engine: {error}.") from error
    if len(data) > MAX_CLIENT_MESSAGE_BYTES:
        raise InvalidRequestError(
            f"The request takes {len(data)} bytes, the engine accepts {MAX_CLIENT_MESSAGE_BYTES}. "
            f"Shorten the prompt, the lists of token ids or `extra`."
        )
    return data


def unpack_request(message: Submit) -> EngineRequest:
    """The request within a `Submit`, validated as if it had been made here.

    Raises:
        InvalidRequestError: It is none, or has a value out of its range.
    """
    try:
        request = _request.decode(message.request)
    except Exception as error:  # msgspec raises more than its own errors, such as UnicodeDecodeError
        if isinstance(error.__cause__, InvalidRequestError):
            raise error.__cause__ from error
        raise InvalidRequestError(f"The request can't be read: {error}") from error
    if request.request_id != message.request_id:
        raise InvalidRequestError("The request has another id than its message.", param="request_id")
    return request


def _decode(decoder: msgspec.msgpack.Decoder[Any], data: bytes, max_bytes: int) -> Any:
    if len(data) > max_bytes:
        raise MalformedMessageError(f"A message of {len(data)} bytes is more than the {max_bytes} allowed.")
    try:
        return decoder.decode(data)
    except Exception as error:  # msgspec raises more than its own errors, such as UnicodeDecodeError
        raise MalformedMessageError(f"{len(data)} bytes that are no message: {error}") from error


def _check_plain(value: Any, path: str, depth: int = 0) -> None:
    if value is None or isinstance(value, (bool, float, str, bytes)):
        return
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return
    if depth < MAX_EXTRA_DEPTH and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            _check_plain(item, f"{path}[{key!r}]", depth + 1)
    elif depth < MAX_EXTRA_DEPTH and isinstance(value, Sequence):
        for index, item in enumerate(value):
            _check_plain(item, f"{path}[{index}]", depth + 1)
    else:
        raise InvalidRequestError(
            f"{path} must be made of None, booleans, 64-bit numbers, strings, bytes, lists and string-keyed dicts, at most "
            f"{MAX_EXTRA_DEPTH} levels deep, to reach the engine; it is of type {type(value).__name__}.",
            param="extra",
        )
