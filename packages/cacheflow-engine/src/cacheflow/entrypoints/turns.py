"""How the HTTP server takes in what comes all at once: in turns, so that a burst of requests does not stop everything else.

An event loop handles all that is ready before it looks again. Of 1,000 requests that come in one instant, each of which takes
0.4 ms to accept, read, check and pass on, all would be answered after 0.4 s, and `/health` behind them. The garbage collector
stops everything as well: for 70 to 150 ms among what 1,000 requests are made of, on the same machine. It knows no routes.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import socket
from collections import deque
from functools import partial
from typing import Any

import uvicorn

from cacheflow.entrypoints.slow_clients import TimedProtocol

logger = logging.getLogger(__name__)

LISTEN_BACKLOG = 2048
"""Connections that the system may keep for us."""
ACCEPTED_AT_A_TIME = 64
"""So many of them are accepted before the loop looks again, which takes 5 ms."""
COLLECTED_EVERY = 100
"""Ticks of the server, of 0.1 s, between two looks for garbage everywhere."""
MANY_CONNECTIONS = 256
"""With so many open, looking everywhere is put off."""
MOST_PUT_OFF = 300
"""Until there are so many times 7,000 objects more, which are about 200 MB; Python's own number is 10."""

TOLD_EVERY_S = 60.0
"""How often it is worth a line in the log that connections are refused."""


def collect_seldom() -> None:
    """Leaves out of all coming garbage collections what is there now, and whole collections to `TurnTakingServer`."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], MOST_PUT_OFF)


class TurnTakingServer(uvicorn.Server):
    """Accepts connections a few at a time, and looks for garbage when there are few.

    Its configuration's `backlog` must be `ACCEPTED_AT_A_TIME`.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens. asyncio has one number for what the system keeps and what is accepted at a time; the first is set here."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(LISTEN_BACKLOG)

    async def on_tick(self, counter: int) -> bool:
        """Called by the server itself, every 0.1 s."""
        if counter % COLLECTED_EVERY == 0 and len(self.server_state.connections) < MANY_CONNECTIONS:
            gc.collect()
        return await super().on_tick(counter)


def turn_taking_protocol(timeout_s: float, max_connections: int) -> Any:
    """What uvicorn takes as `http`: makes the connections of one server. What they send is read in turns, GETs at once.

    Args:
        timeout_s: How long the headers of a request may take.
        max_connections: That may be open; further ones are closed at once.
    """
    queue: deque[tuple[TurnTakingProtocol, bytes]] = deque()
    told_s = -math.inf

    class TurnTakingProtocol(TimedProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
            nonlocal told_s
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.abort()
                if self.loop.time() - told_s > TOLD_EVERY_S:
                    told_s = self.loop.time()
                    logger.warning("%d connections are open, which is the most: further ones are closed.", max_connections)

        def data_received(self, data: bytes) -> None:
            if data.startswith((b"GET ", b"HEAD ")):
                super().data_received(data)
                return
            self.transport.pause_reading()  # So that a connection has one piece here at most, of 256 KiB.
            queue.append((self, data))
            if len(queue) == 1:
                self.loop.call_soon(take_turn)

        def read(self, data: bytes) -> None:
            if not self.transport.is_closing():
                self.transport.resume_reading()
                super().data_received(data)

    def take_turn() -> None:
        connection, data = queue.popleft()
        if queue:
            connection.loop.call_soon(take_turn)
        connection.read(data)

    return partial(TurnTakingProtocol, timeout_s)
