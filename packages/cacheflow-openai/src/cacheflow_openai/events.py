"""Server-sent events: how answers go over the wire while they grow. It knows no endpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from cacheflow.asgi import answer_for, send_stream
from cacheflow.errors import CacheflowError

logger = logging.getLogger(__name__)


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
        self.first = first
        self.rest = rest
        self.own_headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **headers}
        self.is_named = is_named
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events; ends the request when the client hangs up."""
        await send_stream(receive, send, self._events(), self.own_headers)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self.rest):
            try:
                yield self._event(self.first)
                async for value in self.rest:
                    yield self._event(value)
            except Exception as error:
                if not isinstance(error, CacheflowError):
                    logger.exception("A stream failed.")
                document = answer_for(error).document
                yield self._event({**document["error"], "type": "error"} if self.is_named else document)
            if not self.is_named:
                yield b"data: [DONE]\n\n"

    def _event(self, value: dict[str, Any]) -> bytes:
        name = b"event: " + value["type"].encode() + b"\n" if self.is_named else b""
        # ASCII only: some clients take U+2028 for the end of a line.
        return name + b"data: " + json.dumps(value).encode() + b"\n\n"
