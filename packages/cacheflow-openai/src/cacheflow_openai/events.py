"""Server-sent events: how answers go over the wire while they grow. It knows no endpoint."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from cacheflow.asgi import encoded, send_stream

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """An event for each value. An error in the middle is an event too.

    Args:
        first: The first value.
        rest: The other ones; closed when the client hangs up.
        headers: To go with the answer.
        is_named: Whether each event is named by its value's "type", as those of responses are. Other streams end with "[DONE]".
    """

    def __init__(
        self,
        first: dict[str, Any],
        rest: AsyncGenerator[dict[str, Any], None],
        headers: Mapping[str, str],
        *,
        is_named: bool = False,
    ) -> None:
        self.parts = encoded(first, rest, _named_event if is_named else _event, self._error, b"" if is_named else DONE)
        self.own_headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **headers}
        self.is_named = is_named
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events; ends the request when the client hangs up."""
        await send_stream(receive, send, self.parts, self.own_headers)

    def _error(self, document: dict[str, Any]) -> bytes:
        return _named_event({**document["error"], "type": "error"}) if self.is_named else _event(document)


def _event(value: dict[str, Any]) -> bytes:
    # ASCII only: some clients take U+2028 for the end of a line.
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _named_event(value: dict[str, Any]) -> bytes:
    return f"event: {value['type']}\n".encode() + _event(value)
