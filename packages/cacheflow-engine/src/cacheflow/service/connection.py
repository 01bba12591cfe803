"""A client's socket, and how it learns that the other side has gone. It speaks bytes and knows no messages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from cacheflow.service import wire
from cacheflow.service.keys import EngineKey


class Connection:
    """A DEALER socket with a monitor. It speaks bytes."""

    def __init__(self, endpoint: str, key: EngineKey | None) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_ENGINE_MESSAGE_BYTES)
        # ZeroMQ's own threads beat, so that neither a long step there nor a busy loop here looks like death.
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, int(wire.PING_INTERVAL_S * 1000))
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(wire.LEASE_S * 1000))
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.IPV6, "[" in endpoint)
        self._has_key, self._is_tcp = key is not None, endpoint.startswith("tcp:")
        if key is not None:
            key.secure_client(self._socket)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
        self._socket.connect(endpoint)

    @property
    def key_question(self) -> str:
        """What else may be wrong when nobody answers: an engine says nothing to who has another key than it, or none."""
        return ", with a copy of this --engine-key" if self._has_key else ", without an --engine-key" if self._is_tcp else ""

    def send(self, data: bytes) -> None:
        """Sends, or queues until it can be sent; messages keep their order."""
        self._socket.send(data)

    async def receive(self) -> bytes:
        """The next message."""
        return await self._socket.recv()

    def receive_rest(self) -> Iterable[bytes]:
        """What has arrived and not been received."""
        shadow: zmq.Socket[Any] = zmq.Socket.shadow(self._socket)
        with contextlib.suppress(zmq.Again):
            while True:
                yield shadow.recv(zmq.NOBLOCK)

    async def lost(self) -> None:
        """Returns when the other side has closed, or has not been heard of for `LEASE_S`."""
        queue: zmq.Socket[Any] = zmq.Socket.shadow(self._monitor)
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())["event"]
            # A loss that a further event follows was made good before there was anything to lose: while shaking hands.
            if event == zmq.EVENT_DISCONNECTED and not queue.poll(0):
                return

    def close(self, linger_ms: int) -> None:
        """Closes, waiting up to `linger_ms` for messages to leave. May be called twice."""
        if self._socket.closed:
            return
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger_ms)
        self._context.term()
