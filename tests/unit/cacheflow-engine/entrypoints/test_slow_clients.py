"""Clients that take their time, on a real server whose patience is short."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from cacheflow.asgi import ClientGoneError, answer_for, read_json_object, send_answer, send_error, while_connected
from cacheflow.edge import EdgeOptions, Guard
from cacheflow.entrypoints.turns import turn_taking_protocol
from cacheflow.errors import CacheflowError

TIMEOUT_S = 1.0
DEADLINE_S = 180.0
OPTIONS = EdgeOptions(receive_timeout=TIMEOUT_S)
HEAD = b"POST /%s HTTP/1.1\r\nHost: localhost\r\n"

ENDED: list[str] = []
"""Paths of endless answers whose clients have gone."""

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bytes]]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Reads a body, but not on /unread, and takes longer for its answer than a client may for a request."""
    try:
        if scope["path"].startswith("/endless"):
            await read_json_object(receive, 1000)
            with contextlib.suppress(ClientGoneError):
                await while_connected(receive, send_for_ever(send))
            ENDED.append(scope["path"])
            return
        if scope["path"] != "/unread":
            await read_json_object(receive, 1000)
            await asyncio.sleep(2 * TIMEOUT_S)
        await send_answer(send, 200, "text/plain", b"done")
    except CacheflowError as error:
        await send_error(send, answer_for(error))


async def send_for_ever(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while True:
        await send({"type": "http.response.body", "body": b"x" * 2**20, "more_body": True})
        await asyncio.sleep(0)


def talk_to_server(talk: Talk) -> bytes:
    """What the server sent to a client that talks so, until it hung up."""

    async def run() -> bytes:
        config = uvicorn.Config(
            Guard(app, OPTIONS),
            http=turn_taking_protocol(TIMEOUT_S, 100),
            h11_max_incomplete_event_size=OPTIONS.max_header_bytes,
            lifespan="off",
            log_config=None,
            ws="none",
        )
        config.load()
        state = uvicorn.server.ServerState()
        server = await asyncio.get_running_loop().create_server(
            lambda: config.http_protocol_class(config=config, server_state=state, app_state={}),  # type: ignore[call-arg]
            "127.0.0.1",
        )
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            try:
                return await asyncio.wait_for(talk(reader, writer), DEADLINE_S)
            finally:
                writer.close()

    return asyncio.run(run())


async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Sends a byte at a time for as long as the server listens."""
    ended = asyncio.ensure_future(reader.read(-1))
    while not ended.done():
        writer.write(b"a")
        await asyncio.wait((ended,), timeout=0.02)
    with contextlib.suppress(ConnectionError):  # It was cut off while a byte was on its way.
        return ended.result()
    return b""


def test_headers_that_come_byte_by_byte_are_cut_off() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(HEAD % b"" + b"X-Slow: ")
        return await dribble(reader, writer)

    assert talk_to_server(talk) == b""


def test_a_connection_on_which_nothing_comes_is_cut_off() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        with contextlib.suppress(ConnectionError):
            return await reader.read(-1)
        return b""

    assert talk_to_server(talk) == b""


def test_a_body_that_comes_byte_by_byte_is_answered_with_408() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(HEAD % b"" + b"Content-Length: 900\r\n\r\n")
        answer = await reader.readuntil(b"}}")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer.lower()
        return await dribble(reader, writer)

    assert talk_to_server(talk) == b""


def test_a_body_that_nobody_reads_may_not_go_on_for_ever_behind_its_answer() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(HEAD % b"unread" + b"Content-Length: 900\r\n\r\n")
        await reader.readuntil(b"done")
        return await dribble(reader, writer)

    assert talk_to_server(talk) == b""


def test_an_answer_may_take_longer_than_a_request_and_the_next_request_is_taken() -> None:
    request = HEAD % b"" + b"Content-Length: 2\r\n\r\n{}"

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        answers = b""
        for _ in range(2):
            writer.write(request)
            answers += await reader.readuntil(b"done")
        return answers

    assert talk_to_server(talk).count(b"HTTP/1.1 200 OK") == 2


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400, "invalid_http"),
        (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: -5\r\n\r\n", 400, "invalid_http"),
        (b"POST / HTTP/1.1\r\nHost: h\r\nX-Long: " + 300_000 * b"a", 431, "headers_too_large"),
    ],
)
def test_what_is_no_request_is_answered_as_all_errors_are(sent: bytes, status: int, code: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(sent)
        return await reader.readuntil(b"}}")

    head, _, body = talk_to_server(talk).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    error = json.loads(body)["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, code)
    assert status == 400 or "more than 16384 bytes" in error["message"]


def test_who_reads_nothing_of_an_answer_is_cut_off() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(HEAD % b"endless/unread" + b"Content-Length: 2\r\n\r\n{}")
        while "/endless/unread" not in ENDED:
            await asyncio.sleep(0.02)
        return b""

    talk_to_server(talk)


def test_who_reads_an_answer_slowly_is_not_cut_off() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(HEAD % b"endless/slow" + b"Content-Length: 2\r\n\r\n{}")
        for _ in range(60):
            await reader.readexactly(2**18)
            await asyncio.sleep(TIMEOUT_S / 20)
        assert "/endless/slow" not in ENDED
        return b""

    talk_to_server(talk)


@pytest.mark.parametrize(("path", "status"), [(b"unread", 200), (b"", 400)])
def test_a_body_that_turns_to_rubbish_ends_the_connection_whether_it_was_answered_or_not(
    path: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(HEAD % path + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        answer = await reader.readuntil(b"done") if path == b"unread" else b""
        writer.write(b"no size\r\n")
        return answer + await reader.read(-1)

    answer = talk_to_server(talk)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert len(re.findall(rb"HTTP/1.1 \d", answer)) == 1
    assert not [record for record in caplog.records if record.exc_info]
