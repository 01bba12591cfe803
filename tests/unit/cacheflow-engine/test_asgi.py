"""What HTTP frontends share: bodies, errors, and the watch on the client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from cacheflow.asgi import (
    BodyTimeoutError,
    BodyTooLargeError,
    ClientGoneError,
    Receive,
    answer_for,
    read_json_object,
    sampling_params,
    send_stream,
    while_connected,
)
from cacheflow.errors import (
    EngineDeadError,
    EngineDrainingError,
    EngineOverloadedError,
    InvalidRequestError,
    RequestFailedError,
)


def receiver(*messages: dict[str, Any]) -> Receive:
    """Gives the messages in turn, and then nothing ever."""
    left = list(messages)

    async def receive() -> dict[str, Any]:
        return left.pop(0) if left else await asyncio.get_running_loop().create_future()

    return receive


def body(data: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


GONE = {"type": "http.disconnect"}


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequestError("n must be 1.", param="n"), 400, None),
        (BodyTooLargeError(10), 413, None),
        (BodyTimeoutError(10), 408, "request_timeout"),
        (ClientGoneError("Gone."), 499, "client_gone"),
        (RequestFailedError("It failed."), 500, "request_failed"),
        (EngineDeadError("It is dead."), 503, "engine_unavailable"),
        (EngineOverloadedError("It is full."), 503, "overloaded"),
        (EngineDrainingError("It is ending."), 503, "draining"),
    ],
)
def test_every_error_of_ours_has_its_status_and_is_told(error: Exception, status: int, code: str | None) -> None:
    answer = answer_for(error)
    told = answer.document["error"]
    assert (answer.status, told["code"], told["message"]) == (status, code, str(error))
    assert told["param"] == getattr(error, "param", None)


def test_an_overloaded_engine_says_when_to_try_again() -> None:
    assert answer_for(EngineOverloadedError("Full.", retry_after_s=2.3)).headers == {"retry-after": "3"}


def test_the_text_of_an_unforeseen_error_stays_inside() -> None:
    answer = answer_for(KeyError("secret"))
    assert answer.status == 500
    assert "secret" not in answer.document["error"]["message"]


@pytest.mark.parametrize(
    "data",
    [
        '{"a": 1}'.encode("utf-16"),
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "\\ud800"}',
        b'{"\\uDFFF": 1}',
        b'{"a": "\xff"}',
    ],
)
def test_a_body_that_is_not_all_characters_of_utf_8_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="not valid JSON"):
        asyncio.run(read_json_object(receiver(body(data)), 100))


@pytest.mark.parametrize("data", [b'{"a": "\\ud83d\\ude42"}', '{"a": "🙂"}'.encode(), '{"a": "🙂"}'.encode("utf-8-sig")])
def test_a_character_beyond_the_first_65536_may_be_written_either_way(data: bytes) -> None:
    assert asyncio.run(read_json_object(receiver(body(data)), 100)) == {"a": "🙂"}


def test_a_body_in_parts_is_put_together() -> None:
    receive = receiver(body(b'{"a"', more=True), body(b": 1}"))
    assert asyncio.run(read_json_object(receive, 100)) == {"a": 1}


def test_reading_ends_at_the_limit_even_if_more_would_come() -> None:
    with pytest.raises(BodyTooLargeError, match="over 10 bytes"):
        asyncio.run(read_json_object(receiver(body(b" " * 11, more=True)), 10))


def test_a_client_that_goes_while_it_sends_is_noticed() -> None:
    with pytest.raises(ClientGoneError):
        asyncio.run(read_json_object(receiver(body(b"{", more=True), GONE), 100))


def test_token_ids_of_logit_bias_are_read_from_strings() -> None:
    assert sampling_params({"logit_bias": {"12": 3}}).logit_bias == {12: 3}
    for key in ("-1", "1.5", "x", "١"):
        with pytest.raises(InvalidRequestError, match="logit_bias"):
            sampling_params({"logit_bias": {key: 3}})


def test_work_is_cancelled_and_has_let_go_when_the_client_is_gone() -> None:
    events: list[str] = []

    async def work() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)
            events.append("let go")

    async def main() -> None:
        with pytest.raises(ClientGoneError):
            await while_connected(receiver(GONE), work())
        events.append("returned")

    asyncio.run(main())
    assert events == ["let go", "returned"]


def test_the_result_and_the_error_of_work_come_through() -> None:
    async def fail() -> int:
        raise KeyError("x")

    assert asyncio.run(while_connected(receiver(), asyncio.sleep(0, 5))) == 5
    with pytest.raises(KeyError):
        asyncio.run(while_connected(receiver(), fail()))


@pytest.mark.parametrize("client_stays", [True, False])
def test_a_stream_is_closed_whether_it_ends_or_the_client_goes(client_stays: bool) -> None:
    sent: list[dict[str, Any]] = []
    is_closed = False

    async def parts() -> AsyncGenerator[bytes, None]:
        nonlocal is_closed
        try:
            yield b"a"
            if not client_stays:
                await asyncio.get_running_loop().create_future()
            yield b"b"
        finally:
            is_closed = True

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(send_stream(receiver(*([] if client_stays else [GONE])), send, parts(), {"x": "y"}))
    assert is_closed
    assert sent[0] == {"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]}
    assert b"".join(message.get("body", b"") for message in sent) == (b"ab" if client_stays else b"a")
    assert (sent[-1].get("more_body") is False) == client_stays
