"""Who may call an HTTP frontend: the options that all frontends share, and the guard that stands before their routes.

Plain ASGI, so it needs no web framework; third-party frontends may use it too. It knows no routes but those that it is told
are open, and no engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
import secrets
import socket
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cacheflow.asgi import (
    App,
    BodyTimeoutError,
    BodyTooLargeError,
    ErrorAnswer,
    Receive,
    Send,
    answer_for,
    error_document,
    send_answer,
    send_error,
)
from cacheflow.config import option, validate_options
from cacheflow.errors import ConfigError

API_KEY_VARIABLE = "CACHEFLOW_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
METHODS = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"
PREFLIGHT_SECONDS = "600"
MAX_KEY_FILE_BYTES = 65536
MAX_SHOWN = 64
REQUEST_ID_HEADER = "x-request-id"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
EXPOSED_HEADERS = f"{REQUEST_ID_HEADER}, retry-after, x-cacheflow-ignored-fields"


@dataclass(frozen=True, kw_only=True)
class EdgeOptions:
    """The options that every HTTP frontend has: where it listens, and for whom.

    A frontend's own options extend it, and set `port`. Keys of `api_key_file` and of the environment variable
    `CACHEFLOW_API_KEY` are read when the options are made, and stand in `api_key` then.

    Raises:
        ConfigError: A value out of range, two that don't go together, or a file that can't be read.
    """

    host: str = option("localhost", "The address to listen on.")
    port: int = option(8000, "The port to listen on; 0 takes a free one.", minimum=0, maximum=65535)
    api_key: tuple[str, ...] = option(
        (),
        "Clients must send one of these as `Authorization: Bearer KEY`. Other users of the machine can see what stands on a "
        "command line: prefer --api-key-file or the environment variable CACHEFLOW_API_KEY.",
        is_secret=True,
    )
    api_key_file: str | None = option(None, "A file with an API key on each line.")
    allowed_hosts: tuple[str, ...] = option(
        (),
        "Names under which clients may call (their Host header), beside localhost and --host; * is any. "
        "Listening on all addresses, any address and the machine's own name are allowed too.",
    )
    allow_credentials: bool = option(False, "Browsers may send cookies and such along (CORS).")
    allowed_origins: tuple[str, ...] = option(
        (),
        "Web pages of these origins may call (CORS): a JSON list or separated by commas; * is all. "
        "Default: only pages of this server.",
    )
    allowed_methods: tuple[str, ...] = option(("*",), "With these HTTP methods.")
    allowed_headers: tuple[str, ...] = option(("*",), "With these HTTP headers.")
    max_body_bytes: int = option(8 * 2**20, "The largest request body.", minimum=1024, unit="bytes")
    max_header_bytes: int = option(16384, "The most that a request's headers may have together.", minimum=1024, unit="bytes")
    receive_timeout: float = option(
        60.0,
        "How long a client may take to send a request's headers, and then its body, and to read some of its answer.",
        minimum=0.1,
        unit="s",
    )
    metrics_port: int | None = option(
        None, "Serve /metrics and /health on this port too, without a key; 0 takes a free one.", minimum=0, maximum=65535
    )
    ssl_certfile: str | None = option(None, "Serve HTTPS with this certificate (PEM).")
    ssl_keyfile: str | None = option(None, "Its private key (PEM), if that is not in the same file.")
    drain_timeout: float = option(
        20.0, "How long running answers may go on after SIGTERM or Ctrl-C before they end with an error.", minimum=0, unit="s"
    )
    root_path: str = option("", "The path under which a proxy shows this server, such as /llm.")

    def __post_init__(self) -> None:
        validate_options(self)
        object.__setattr__(self, "api_key", tuple(dict.fromkeys((*self.api_key, *_keys_from_elsewhere(self.api_key_file)))))
        for key in self.api_key:
            if not key.isascii() or not key.isprintable() or key != key.strip() or not key:
                raise ConfigError(
                    "An API key must be printable ASCII without blanks around it, as HTTP headers carry no other."
                )
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"--root-path must begin with a slash and not end with one, got {self.root_path!r}.")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile, the certificate that the key belongs to.")
        if self.ssl_certfile is not None:
            _check_certificate(self.ssl_certfile, self.ssl_keyfile)


class Guard:
    """An ASGI application that lets only those requests through to `app` that may come in.

    It answers all others itself, in this order: too large headers 431, a Host that is not this server's 403, a web page of
    another origin 403 (CORS preflights of allowed origins are answered here too), no valid key 401 on every path that is not
    named open, a compressed body 415, a too large one 413. All answers to allowed origins carry CORS headers, those to errors
    included.
    A body that takes too long, or turns out to be too large, ends `app`'s `receive` with an `InvalidRequestError`.

    Every answer has the header `x-request-id`: the client's own, or one that is drawn. `scope["state"]["request_id"]` is what
    the engine should know the request as: it is that id, made unique where it is a client's.
    """

    def __init__(self, app: App, options: EdgeOptions, open_paths: Iterable[str] = ("/health", "/health/ready")) -> None:
        """Stands before `app`.

        Args:
            app: What is guarded.
            options: Whom to let in.
            open_paths: What needs no key; an entry that ends in "/*" opens all that is below it.
        """
        self._app = app
        self._options = options
        self._open_paths = frozenset(path for path in open_paths if not path.endswith("/*"))
        self._open_prefixes = tuple(path[:-1] for path in open_paths if path.endswith("/*"))
        self._key_digests = [_digest(key.encode()) for key in options.api_key]
        self._hosts = _own_names(options)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answers the request, or has `app` answer it."""
        if scope["type"] == "websocket":  # There are none here, and no second way in.
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _Headers(scope["headers"])
        request_id = headers.get(REQUEST_ID_HEADER) or ""
        is_given = REQUEST_ID.fullmatch(request_id) is not None
        if not is_given:
            request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = f"{request_id}-{secrets.token_hex(4)}" if is_given else request_id
        send = _with_headers(send, {REQUEST_ID_HEADER: request_id})
        origin = headers.get("origin")
        is_foreign = origin is not None and origin.partition("://")[2].lower() != (headers.get("host") or "").lower()
        refused = self._refuse_sender(scope, headers, origin if is_foreign else None)
        if refused is not None:
            await send_error(send, refused)
            return
        if is_foreign:
            send = _with_headers(send, self._cors_headers(origin or ""))
            if scope["method"] == "OPTIONS" and headers.get("access-control-request-method"):
                await self._answer_preflight(headers, send)
                return
        refused = self._refuse_key(scope, headers) or self._refuse_body(headers)
        if refused is not None:
            await send_error(send, refused)
            return
        await self._app(scope, _bounded(receive, self._options.max_body_bytes, self._options.receive_timeout), send)

    def _refuse_sender(self, scope: Any, headers: _Headers, foreign_origin: str | None) -> ErrorAnswer | None:
        num_bytes = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if num_bytes > self._options.max_header_bytes:
            message = f"The headers have {num_bytes} bytes; at most {self._options.max_header_bytes} are taken."
            return ErrorAnswer(431, error_document(message, "invalid_request_error", code="headers_too_large"))
        # A request without a Host is no browser's (it is HTTP/1.0).
        for host in headers.all("host"):
            if not self._is_own_name(host):
                message = f"This server is not {host[:MAX_SHOWN]!r}. If it is meant to be, start it with --allowed-hosts."
                return ErrorAnswer(403, error_document(message, "invalid_request_error", code="host_not_allowed"))
        allowed = self._options.allowed_origins
        if foreign_origin is not None and "*" not in allowed and foreign_origin not in allowed:
            message = (
                f"Web pages of {foreign_origin[:MAX_SHOWN]!r} may not call this server. "
                "If they are meant to, start it with --allowed-origins."
            )
            return ErrorAnswer(403, error_document(message, "invalid_request_error", code="origin_not_allowed"))
        return None

    def _refuse_key(self, scope: Any, headers: _Headers) -> ErrorAnswer | None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if not self._key_digests or path in self._open_paths or path.startswith(self._open_prefixes):
            return None
        scheme, _, key = (headers.get("authorization") or "").partition(" ")
        digest = _digest(key.strip().encode("latin-1"))
        # All keys are compared, each in constant time, so that the time taken tells nothing about any of them.
        matches = [hmac.compare_digest(digest, known) for known in self._key_digests]
        if scheme.lower() == "bearer" and any(matches):
            return None
        message = "This needs an API key: send a valid one as `Authorization: Bearer KEY`."
        document = error_document(message, "authentication_error", code="invalid_api_key")
        return ErrorAnswer(401, document, {"www-authenticate": "Bearer"})

    def _refuse_body(self, headers: _Headers) -> ErrorAnswer | None:
        encoding = (headers.get("content-encoding") or "identity").strip()
        if encoding.lower() != "identity":
            # A small one could become very large, and no client compresses requests unless it is told to.
            message = f"Bodies are read as they are, not as {encoding[:MAX_SHOWN]!r}. Send it without a Content-Encoding."
            document = error_document(message, "invalid_request_error", code="unsupported_media_type")
            return ErrorAnswer(415, document, {"accept-encoding": "identity"})
        length = headers.get("content-length") or ""
        if length.isdecimal() and int(length[:20]) > self._options.max_body_bytes:
            return answer_for(BodyTooLargeError(self._options.max_body_bytes))
        return None

    def _is_own_name(self, host: str) -> bool:
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        name = name.lower().rstrip(".")
        if name in self._hosts or "*" in self._hosts:
            return True
        # An address can't be made to mean another machine, as a name can (DNS rebinding).
        return self._options.host in ("", "0.0.0.0", "::") and _is_address(name)

    def _cors_headers(self, origin: str) -> dict[str, str]:
        options = self._options
        is_any = "*" in options.allowed_origins and not options.allow_credentials
        headers = {
            "access-control-allow-origin": "*" if is_any else origin,
            "access-control-expose-headers": EXPOSED_HEADERS,
            "vary": "Origin",
        }
        if options.allow_credentials:
            headers["access-control-allow-credentials"] = "true"
        return headers

    async def _answer_preflight(self, asked: _Headers, send: Send) -> None:
        options = self._options
        method = asked.get("access-control-request-method") or ""
        if "*" not in options.allowed_methods and method not in options.allowed_methods:
            message = (
                f"Web pages of other origins may not {method[:MAX_SHOWN]} here; allowed: {', '.join(options.allowed_methods)}."
            )
            await send_error(
                send, ErrorAnswer(400, error_document(message, "invalid_request_error", code="method_not_allowed"))
            )
            return
        wanted = asked.get("access-control-request-headers") or "authorization, content-type"
        headers = {
            "access-control-allow-methods": METHODS if "*" in options.allowed_methods else ", ".join(options.allowed_methods),
            "access-control-allow-headers": wanted if "*" in options.allowed_headers else ", ".join(options.allowed_headers),
            "access-control-max-age": PREFLIGHT_SECONDS,
        }
        await send_answer(send, 200, "text/plain", b"", headers)


class _Headers:
    """A request's headers by name, which ASGI gives in small letters."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self._pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in raw]

    def get(self, name: str) -> str | None:
        return next(iter(self.all(name)), None)

    def all(self, name: str) -> list[str]:
        return [value for known, value in self._pairs if known == name]


def keys_from_environment() -> list[str]:
    """The API keys in the variable `CACHEFLOW_API_KEY`, where commas separate them."""
    return [key for part in os.environ.get(API_KEY_VARIABLE, "").split(",") if (key := part.strip())]


def _keys_from_elsewhere(path: str | None) -> list[str]:
    keys = keys_from_environment()
    if path is not None:
        try:
            with Path(path).open(encoding="utf-8") as file:
                lines = file.read(MAX_KEY_FILE_BYTES).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {path} can't be read: {error}.") from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ConfigError(f"--api-key-file {path} has no key in it. Write one on each line.")
        keys += found
    return keys


def _check_certificate(certfile: str, keyfile: str | None) -> None:
    import ssl  # Not paid for by those who serve without it.

    try:
        # An empty password, so that an encrypted key is an error and no question on a terminal that nobody looks at.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password="")
    except OSError as error:
        raise ConfigError(
            f"--ssl-certfile {certfile} with the key in {keyfile or certfile} can't be used: {error}. "
            "Both must be PEM files that belong together, the key without a password."
        ) from error


def _own_names(options: EdgeOptions) -> frozenset[str]:
    names = {*LOOPBACK, options.host.lower(), *(name.lower().strip("[]") for name in options.allowed_hosts)}
    if options.host in ("", "0.0.0.0", "::"):
        names.add(socket.gethostname().lower())
    return frozenset(names)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _digest(key: bytes) -> bytes:
    """Of equal length for all keys, so that comparing does not tell how long they are."""
    return hashlib.sha256(key).digest()


def _bounded(receive: Receive, max_bytes: int, timeout_s: float) -> Receive:
    """`receive`, which raises once the body has become too large, or is not there in time."""
    num_bytes = 0
    is_whole = False
    end_s = asyncio.get_running_loop().time() + timeout_s

    async def receive_bounded() -> MutableMapping[str, Any]:
        nonlocal num_bytes, is_whole
        if is_whole:
            return await receive()  # What comes now is that the client has gone, some day.
        try:
            message = await asyncio.wait_for(receive(), end_s - asyncio.get_running_loop().time())
        except asyncio.TimeoutError:
            raise BodyTimeoutError(timeout_s) from None
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise BodyTooLargeError(max_bytes)
        is_whole = not message.get("more_body", False)
        return message

    return receive_bounded


def _with_headers(send: Send, headers: dict[str, str]) -> Send:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]

    async def send_with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *raw]}
        await send(message)

    return send_with_headers
