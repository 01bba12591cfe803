"""HTTP/1.1 as uvicorn speaks it, with limits on how long a client may take: for a request's headers, to read of its answer.

What is no such request is answered as all errors are. Bodies have their limits in `cacheflow.edge`. It knows no application. It
imports uvicorn, which is there where a frontend is.
"""

from __future__ import annotations

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol  # Not httptools, which has no limit on headers.

from cacheflow.asgi import error_document


class TimedProtocol(H11Protocol):
    """Cuts a connection off that is not within an answer for too long: it sent nothing, or bytes that make up no request.

    So it does with one that takes nothing of its answer for as long, once more waits for it than the system keeps.
    Between two requests uvicorn closes a connection on which nothing comes at all, and does so sooner.
    """

    def __init__(self, timeout_s: float, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timeout_s = timeout_s
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """The time begins."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """It ends with the headers of a request, and begins anew with its answer's end."""
        super().data_received(data)
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls where h11 has raised; its own answer is plain text, and 400 for too large headers too."""
        status, kind = HTTPStatus.BAD_REQUEST, "invalid_request_error"
        document = error_document("This is no valid HTTP/1.1 request.", kind, code="invalid_http")
        if getattr(sys.exc_info()[1], "error_status_hint", 0) == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            message = f"The headers have more than {self.config.h11_max_incomplete_event_size} bytes; no more are taken."
            document = error_document(message, kind, code="headers_too_large")
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # Else there is an answer already, to what came before.
            body = json.dumps(document).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
            start = h11.Response(status_code=status, headers=headers, reason=status.phrase)
            for event in (start, h11.Data(body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def pause_writing(self) -> None:
        """More waits to be sent than is kept: the client does not read, or not as fast."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """It has read."""
        self._unwatch_writing()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is of no concern any more."""
        self._unwatch()
        self._unwatch_writing()
        super().connection_lost(exc)

    def _watch_writing(self) -> None:
        num_bytes = self.transport.get_write_buffer_size()

        def check() -> None:
            if self.transport.get_write_buffer_size() >= num_bytes:
                self.transport.abort()  # It has taken nothing at all.
            else:
                self._watch_writing()

        self._write_deadline = self.loop.call_later(self._timeout_s, check)

    def _unwatch_writing(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self._timeout_s, self.transport.abort)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
