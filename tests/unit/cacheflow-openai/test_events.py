"""Server-sent events, and how an error in the middle is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

import pytest

from cacheflow.errors import EngineDeadError
from cacheflow_openai.events import EventStream


async def failing(error: Exception) -> AsyncGenerator[dict[str, Any], None]:
    yield {"type": "response.in_progress"}
    raise error


def sent(error: Exception, *, is_named: bool) -> list[str]:
    """The events of a stream that fails behind its second value."""
    parts: list[bytes] = []

    async def receive() -> MutableMapping[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        parts.append(message.get("body", b""))

    stream = EventStream({"type": "response.created"}, failing(error), {}, is_named=is_named)
    asyncio.run(stream({"type": "http"}, receive, send))
    *events, rest = b"".join(parts).decode().split("\n\n")
    assert rest == ""
    return events


def test_an_error_in_the_middle_is_an_event_before_the_end() -> None:
    *_, told, done = sent(EngineDeadError("The engine is gone."), is_named=False)
    assert json.loads(told.removeprefix("data: "))["error"] == {
        "message": "The engine is gone.", "type": "server_error", "param": None, "code": "engine_unavailable",
    }  # fmt: skip
    assert done == "data: [DONE]"


def test_an_error_in_the_middle_of_named_events_is_one_named_error() -> None:
    told = sent(EngineDeadError("The engine is gone."), is_named=True)[-1]
    name, data = told.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error", "message": "The engine is gone.", "param": None, "code": "engine_unavailable",
    }  # fmt: skip


@pytest.mark.parametrize("is_named", [False, True])
def test_what_a_bug_says_is_not_told(is_named: bool) -> None:
    told = " ".join(sent(KeyError("secret"), is_named=is_named))
    assert "Internal error" in told
    assert "secret" not in told
