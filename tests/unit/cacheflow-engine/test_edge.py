"""The guard before every frontend's routes, driven over ASGI in front of a small application."""

from __future__ import annotations

import asyncio
import hmac
import json
from pathlib import Path
from typing import Any

import pytest

from cacheflow.asgi import BodyTimeoutError
from cacheflow.edge import EdgeOptions, Guard
from cacheflow.errors import ConfigError

JSON_HEADERS = [(b"content-type", b"application/json")]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Reads the whole body and says how long it is; fails on /broken after its answer has begun."""
    num_bytes, more = 0, True
    while more:
        message = await receive()
        num_bytes, more = num_bytes + len(message["body"]), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 500 if scope["path"] == "/broken" else 200, "headers": JSON_HEADERS})
    await send({"type": "http.response.body", "body": str(num_bytes).encode()})


class Answer:
    def __init__(self, messages: list[Any]) -> None:
        self.status = messages[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
        self.body = b"".join(message.get("body", b"") for message in messages[1:])

    @property
    def error(self) -> dict[str, Any]:
        found = json.loads(self.body)["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return found


def ask(
    options: EdgeOptions,
    path: str = "/generate",
    method: str = "POST",
    parts: tuple[bytes, ...] = (b"{}",),
    root_path: str = "",
    **headers: str,
) -> Answer:
    sent: list[Any] = []
    queue = [{"type": "http.request", "body": part, "more_body": number < len(parts) - 1} for number, part in enumerate(parts)]

    async def receive() -> Any:
        return queue.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    named = {"host": "localhost:8001", **{name.replace("_", "-"): value for name, value in headers.items()}}
    scope = {
        "type": "http",
        "method": method,
        "path": root_path + path,
        "root_path": root_path,
        "headers": [(name.encode(), value.encode()) for name, value in named.items() if value],
    }
    guard = Guard(echo, options, ("/", "/health", "/page/*"))
    asyncio.run(guard(scope, receive, send))
    return Answer(sent)


@pytest.mark.parametrize("host", ["localhost", "localhost:8001", "127.0.0.1:8001", "[::1]:8001", "LOCALHOST.", ""])
def test_the_loopback_names_may_be_called(host: str) -> None:
    assert ask(EdgeOptions(), host=host).status == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "GZIP"])
def test_a_compressed_body_is_refused_by_its_name(encoding: str) -> None:
    answer = ask(EdgeOptions(), content_encoding=encoding, parts=(b"\x1f\x8b\x08",))
    assert answer.status == 415
    assert answer.headers["accept-encoding"] == "identity"
    assert answer.error["code"] == "unsupported_media_type"
    assert encoding in answer.error["message"]


def test_a_body_that_says_it_is_not_encoded_is_taken() -> None:
    assert ask(EdgeOptions(), content_encoding="Identity").status == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8001", "10.0.0.7", "[::2]", "127.0.0.1.nip.io"])
def test_another_host_is_refused_so_that_no_name_can_be_rebound_to_this_server(host: str) -> None:
    answer = ask(EdgeOptions(), host=host)
    assert (answer.status, answer.error["code"]) == (403, "host_not_allowed")


def test_further_hosts_can_be_allowed() -> None:
    assert ask(EdgeOptions(allowed_hosts=("llm.example",)), host="llm.example:443").status == 200
    assert ask(EdgeOptions(allowed_hosts=("*",)), host="anything.example").status == 200
    assert ask(EdgeOptions(host="box.example"), host="box.example").status == 200


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::"])
def test_on_all_addresses_any_address_is_a_host_but_not_any_name(wildcard: str) -> None:
    options = EdgeOptions(host=wildcard)
    assert ask(options, host="10.0.0.7:8001").status == 200
    assert ask(options, host="[fd00::7]:8001").status == 200
    assert ask(options, host="evil.example").status == 403


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", "http://localhost"])
def test_a_web_page_of_another_origin_is_refused(origin: str) -> None:
    answer = ask(EdgeOptions(), origin=origin)
    assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_servers_own_page_may_call() -> None:
    answer = ask(EdgeOptions(), origin="http://localhost:8001")
    assert answer.status == 200
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [("/generate", {}, 200), ("/broken", {}, 500), ("/generate", {"authorization": "Bearer wrong"}, 401)],
)
def test_answers_to_an_allowed_origin_carry_cors_headers_errors_too(path: str, headers: dict[str, str], status: int) -> None:
    key = ("k",) if status == 401 else ()
    answer = ask(EdgeOptions(allowed_origins=("https://a.example",), api_key=key), path, origin="https://a.example", **headers)
    assert answer.status == status
    assert answer.headers["access-control-allow-origin"] == "https://a.example"


def test_a_preflight_needs_no_key() -> None:
    options = EdgeOptions(allowed_origins=("https://a.example",), api_key=("k",), allowed_methods=("POST",))
    asked = {"origin": "https://a.example", "access_control_request_headers": "authorization"}
    answer = ask(options, method="OPTIONS", access_control_request_method="POST", **asked)
    assert (answer.status, answer.headers["access-control-allow-headers"]) == (200, "authorization")
    assert ask(options, method="OPTIONS", access_control_request_method="PUT", **asked).status == 400
    assert ask(options, method="OPTIONS").status == 401


@pytest.mark.parametrize("key", ["Bearer one", "bearer one", "Bearer two"])
def test_any_of_the_keys_opens(key: str) -> None:
    assert ask(EdgeOptions(api_key=("one", "two")), authorization=key).status == 200


@pytest.mark.parametrize(
    "key", ["", "Bearer", "Bearer ", "Bearer on", "Bearer onee", "Bearer ONE", "Basic one", "one", "Bearer ÿ"]
)
def test_anything_else_does_not(key: str) -> None:
    answer = ask(EdgeOptions(api_key=("one", "two")), authorization=key)
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/generate", "/metrics", "/stats", "/openapi.json", "/v1/models", "/nothing", "/healthy", "/page"]
)
def test_every_path_needs_a_key_unless_it_is_named_open(path: str) -> None:
    assert ask(EdgeOptions(api_key=("k",)), path, method="GET").status == 401


@pytest.mark.parametrize("path", ["/", "/health", "/page/style.css"])
@pytest.mark.parametrize("root_path", ["", "/llm"])
def test_open_paths_need_none(path: str, root_path: str) -> None:
    assert ask(EdgeOptions(api_key=("k",), root_path=root_path), path, method="GET", root_path=root_path).status == 200


@pytest.mark.parametrize("key", ["first", "last", "neither"])
def test_all_keys_are_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    compared: list[int] = []
    compare = hmac.compare_digest

    def count(a: bytes, b: bytes) -> bool:
        compared.append(len(a))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", count)
    ask(EdgeOptions(api_key=("first", "a-much-longer-one", "last")), authorization=f"Bearer {key}")
    assert compared == [32, 32, 32]


def test_too_large_headers_are_refused() -> None:
    answer = ask(EdgeOptions(max_header_bytes=2000), x_long="a" * 2000)
    assert (answer.status, answer.error["code"]) == (431, "headers_too_large")


def test_a_body_is_refused_by_its_stated_length() -> None:
    assert ask(EdgeOptions(max_body_bytes=2000), content_length="2001").status == 413
    assert ask(EdgeOptions(max_body_bytes=2000), content_length="9" * 5000).status == 413


def test_a_body_of_unstated_length_is_cut_off() -> None:
    with pytest.raises(Exception, match="over 2000 bytes"):
        ask(EdgeOptions(max_body_bytes=2000), parts=(b"a" * 1500, b"a" * 501))


@pytest.mark.parametrize("num_parts", [0, 5])
def test_a_body_that_does_not_end_in_time_is_given_up(num_parts: int) -> None:
    async def receive() -> Any:
        nonlocal num_parts
        num_parts -= 1
        if num_parts < 0:
            await asyncio.get_running_loop().create_future()
        return {"type": "http.request", "body": b"a", "more_body": True}

    guard = Guard(echo, EdgeOptions(receive_timeout=0.1))
    with pytest.raises(BodyTimeoutError, match=r"within 0\.1 s"):
        asyncio.run(guard({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, None))  # type: ignore[arg-type]


def test_after_the_body_a_client_may_be_silent_for_as_long_as_the_answer_takes() -> None:
    async def wait_for_the_end(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        assert (await receive())["type"] == "http.disconnect"

    messages = [{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        if len(messages) == 1:
            await asyncio.sleep(0.2)  # Twice what a body may take.
        return messages.pop(0)

    guard = Guard(wait_for_the_end, EdgeOptions(receive_timeout=0.1))
    asyncio.run(guard({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, None))  # type: ignore[arg-type]
    assert messages == []


def test_every_answer_has_an_id_of_its_own_those_to_refused_requests_too() -> None:
    options = EdgeOptions(api_key=("k",))
    answers = [ask(options, **headers) for headers in ({}, {"authorization": "Bearer k"}, {"host": "evil.example"}) * 2]
    assert {answer.status for answer in answers} == {200, 401, 403}
    assert len({answer.headers["x-request-id"] for answer in answers}) == 6


@pytest.mark.parametrize("given", ["abc-123", "A.b:c_9", "a" * 64])
def test_a_clients_own_id_stands_on_the_answer_and_is_made_unique_for_the_engine(given: str) -> None:
    known = []

    async def note(scope: Any, receive: Any, send: Any) -> None:
        known.append(scope["state"]["request_id"])
        await echo(scope, receive, send)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"x-request-id", given.encode())]}
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    for _ in range(2):
        asyncio.run(Guard(note, EdgeOptions())(dict(scope), receive, send))
    assert (b"x-request-id", given.encode()) in sent[0]["headers"]
    assert known[0] != known[1]
    assert all(name.startswith(f"{given}-") and len(name) < 100 for name in known)


@pytest.mark.parametrize("given", ["a" * 65, "a b", "a\tb", "ä", "<b>"])
def test_an_id_that_is_none_is_not_repeated(given: str) -> None:
    assert ask(EdgeOptions(), x_request_id=given).headers["x-request-id"] != given


def test_keys_come_from_a_file_and_the_environment_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    monkeypatch.setenv("CACHEFLOW_API_KEY", "three, four")
    options = EdgeOptions(api_key=("zero",), api_key_file=str(file))
    assert set(options.api_key) == {"zero", "one", "two", "three", "four"}
    assert "zero" not in repr(options)


def test_a_key_file_without_a_key_is_an_error_and_not_an_open_door(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\n")
    with pytest.raises(ConfigError, match="has no key"):
        EdgeOptions(api_key_file=str(file))
    with pytest.raises(ConfigError, match="can't be read"):
        EdgeOptions(api_key_file=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_key": ("",)}, "printable ASCII"),
        ({"api_key": ("a\nb",)}, "printable ASCII"),
        ({"root_path": "llm"}, "--root-path"),
        ({"root_path": "/llm/"}, "--root-path"),
        ({"ssl_keyfile": "key.pem"}, "needs --ssl-certfile"),
        ({"ssl_certfile": "missing.pem"}, "can't be used"),
        ({"max_body_bytes": 1}, "--max-body-bytes"),
    ],
)
def test_an_option_that_can_not_hold_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EdgeOptions(**options)


def test_there_are_no_websockets() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(echo, EdgeOptions())({"type": "websocket", "path": "/", "headers": []}, None, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]
