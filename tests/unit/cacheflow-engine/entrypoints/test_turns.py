"""A burst of requests, and what else wants to be served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from cacheflow.entrypoints.turns import ACCEPTED_AT_A_TIME, TurnTakingServer, turn_taking_protocol

DEADLINE_S = 180.0


class Recorder:
    """An application that answers with the size of the body, and remembers in which order it was called."""

    def __init__(self) -> None:
        self.methods: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.methods.append(scope["method"])
        num_bytes, more = 0, True
        while more:
            message = await receive()
            num_bytes += len(message.get("body", b""))
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d bytes" % num_bytes})


@contextlib.asynccontextmanager
async def serving(app: Any, max_connections: int = 1000) -> AsyncIterator[tuple[str, int]]:
    """Where it listens."""
    protocol = turn_taking_protocol(DEADLINE_S, max_connections)
    config = uvicorn.Config(app, http=protocol, backlog=ACCEPTED_AT_A_TIME, lifespan="off", log_config=None, ws="none")
    server = TurnTakingServer(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server._serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield listener.getsockname()
        server.should_exit = True
        await asyncio.wait_for(task, DEADLINE_S)


def connect(where: tuple[str, int], data: bytes) -> socket.socket:
    connection = socket.create_connection(where, timeout=DEADLINE_S)
    connection.sendall(data)
    return connection


def test_a_get_that_comes_last_is_answered_before_most_of_a_burst() -> None:
    app = Recorder()

    async def run() -> None:
        async with serving(app) as where:
            # The loop stands still meanwhile; the system keeps the connections.
            burst = [connect(where, b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}") for _ in range(200)]
            burst.append(connect(where, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"))
            while len(app.methods) < 201:
                await asyncio.sleep(0)
            for connection in burst:
                assert (await asyncio.to_thread(connection.recv, 100)).startswith(b"HTTP/1.1 200 ")
                connection.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))
    assert app.methods.index("GET") < 50


def test_pieces_of_a_large_body_stay_in_order_and_whole() -> None:
    async def run() -> None:
        async with serving(Recorder()) as where:
            reader, writer = await asyncio.open_connection(*where)
            for num_bytes in (3_000_000, 5):
                writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % num_bytes)
                writer.write(b"GET /" * (num_bytes // 5))
                assert b"200 OK" in await reader.readuntil(b"%d bytes" % num_bytes)
            writer.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_of_a_body_that_the_application_does_not_read_only_a_bounded_part_is_taken() -> None:
    is_told = asyncio.Event()
    recorder = Recorder()

    async def waiting(scope: Any, receive: Any, send: Any) -> None:
        await is_told.wait()
        await recorder(scope, receive, send)

    async def run() -> None:
        num_bytes = 64 * 2**20
        async with serving(waiting) as where:
            reader, writer = await asyncio.open_connection(*where)
            writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % num_bytes)
            writer.write(b"x" * num_bytes)
            num_left, before = num_bytes, -1
            while num_left != before:  # What is left stays: the server takes no more.
                before = num_left
                await asyncio.sleep(0.2)
                num_left = writer.transport.get_write_buffer_size()
            assert num_left > num_bytes / 2  # The system's own buffers have up to 10 MB.
            is_told.set()
            assert b"200 OK" in await reader.readuntil(b"%d bytes" % num_bytes)
            writer.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_connections_beyond_the_most_are_closed_until_one_has_gone(caplog: pytest.LogCaptureFixture) -> None:
    async def is_answered(where: tuple[str, int]) -> bool:
        reader, writer = await asyncio.open_connection(*where)
        with contextlib.suppress(ConnectionError):
            writer.write(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
            return answer.startswith(b"HTTP/1.1 200 ")
        return False

    async def run() -> None:
        async with serving(Recorder(), max_connections=3) as where:
            idle = [await asyncio.open_connection(*where) for _ in range(2)]
            assert await is_answered(where)
            idle.append(await asyncio.open_connection(*where))
            assert [await is_answered(where) for _ in range(5)] == [False] * 5
            for _, writer in idle:
                writer.close()
            while not await is_answered(where):
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))
    assert caplog.text.count("3 connections are open") == 1


def test_a_client_that_goes_before_its_turn_is_forgotten() -> None:
    app = Recorder()

    async def run() -> None:
        async with serving(app) as where:
            for connection in [connect(where, b"POST / HTTP/1.1\r\n") for _ in range(100)]:
                connection.close()
            reader, writer = await asyncio.open_connection(*where)
            writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}")
            assert b"200 OK" in await reader.readuntil(b"2 bytes")
            writer.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))
    assert app.methods == ["POST"]
