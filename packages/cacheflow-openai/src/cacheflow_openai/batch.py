"""OpenAI's batch file format: which lines of an input are still to do, and what is written for each.

It has requests answered by an ASGI application, the same one that serves HTTP; it knows no endpoint's fields and no engine.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cacheflow.errors import ConfigError, EngineDeadError

logger = logging.getLogger(__name__)

URLS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses")
MAX_LINE_BYTES = 64 * 2**20
MAX_ID_LENGTH = 512
"""OpenAI's limit for a custom_id."""
MAX_TRIES = 60
"""How often a request is tried that the engine has no room for, each time after what the `Retry-After` says."""
RETRY_S = 1.0

Key = str | int
"""What tells lines apart: a custom_id, or the number of a line that has none."""


@dataclass(frozen=True)
class Line:
    """A line of the input that has no answer yet.

    Attributes:
        number: From 1.
        start: Its first byte in the file.
        num_bytes: Its length.
    """

    number: int
    start: int
    num_bytes: int


class InvalidLineError(Exception):
    """A line that is no request. `custom_id` is its own, if it has one that can be read."""

    def __init__(self, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.custom_id = custom_id


@dataclass(frozen=True)
class BatchRequest:
    """What a line asks for."""

    custom_id: str
    url: str
    body: bytes


def parse_line(data: bytes) -> BatchRequest:
    """Reads a line.

    Raises:
        InvalidLineError: It is no request, and why.
    """
    if len(data) > MAX_LINE_BYTES:
        raise InvalidLineError(f"The line has {len(data)} bytes; at most {MAX_LINE_BYTES} are taken.")
    try:
        entry = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidLineError(f"The line is no JSON: {error}") from error
    if not isinstance(entry, dict):
        raise InvalidLineError("The line must be a JSON object with custom_id, method, url and body.")
    name = entry.get("custom_id")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_ID_LENGTH or not _is_utf8(name):
        raise InvalidLineError(f"custom_id must be a string of 1 to {MAX_ID_LENGTH} characters.")
    body = entry.get("body")
    if entry.get("method") != "POST":
        raise InvalidLineError('method must be "POST".', name)
    if entry.get("url") not in URLS:
        raise InvalidLineError(f"url must be one of {', '.join(URLS)}.", name)
    if not isinstance(body, dict):
        raise InvalidLineError("body must be an object: what the endpoint takes.", name)
    if body.get("stream"):
        raise InvalidLineError("A batch can't stream. Leave stream out of the body.", name)
    return BatchRequest(name, entry["url"], json.dumps(body).encode())


def pending_lines(source: Path, done: set[Key]) -> list[Line]:
    """The lines of `source` that `done` does not have; empty lines don't count.

    Raises:
        ConfigError: Two lines have the same custom_id, or `done` has an answer for a line that is not there.
    """
    pending: list[Line] = []
    numbers: dict[Key, int] = {}
    start = 0
    with source.open("rb") as file:
        for number, data in enumerate(file, 1):
            line, start = Line(number, start, len(data)), start + len(data)
            if not data.strip():
                continue
            key: Key
            try:
                key = parse_line(data).custom_id
            except InvalidLineError as error:
                key = error.custom_id or number
            if key in numbers:
                raise ConfigError(
                    f"{source}: lines {numbers[key]} and {number} have the same custom_id {key!r}, so that their answers could "
                    "not be told apart. Give each line its own."
                )
            numbers[key] = number
            if key not in done:
                pending.append(line)
    strangers = [key for key in done if key not in numbers]
    if strangers:
        raise ConfigError(
            f"The output has answers to {len(strangers)} lines that {source} does not have, such as {strangers[0]!r}: it is of "
            "another input. Name another output file."
        )
    return pending


class BatchOutput:
    """The output file: answers of an earlier run, and those that are added now. Only one process at a time can have it open.

    Attributes:
        done: What has an answer.
    """

    def __init__(self, path: Path) -> None:
        """Opens or makes it. A last line that was torn when an earlier run was ended is dropped.

        Raises:
            ConfigError: It can't be opened, another process has it, or it is something else than a batch's output.
        """
        try:
            self._file: IO[bytes] = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"{path} can't be written: {error.strerror}.") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.done = self._read(path)
        except BlockingIOError as error:
            self._file.close()
            raise ConfigError(f"{path} is being written by another process. Wait for it, or name another file.") from error
        except ConfigError:
            self._file.close()
            raise

    def _read(self, path: Path) -> set[Key]:
        self._file.seek(0)
        done: set[Key] = set()
        end = 0
        for number, data in enumerate(self._file, 1):
            if not data.endswith(b"\n"):
                break
            try:
                entry = json.loads(data)
                key = entry["custom_id"] if entry["custom_id"] is not None else entry["error"]["line"]
                if not isinstance(key, (str, int)) or "response" not in entry:
                    raise TypeError
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"{path}: line {number} is no answer of a batch. Name another output file.") from error
            done.add(key)
            end += len(data)
        self._file.truncate(end)
        return done

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Adds answers; on return they are on the disk."""
        self._file.write(b"".join(json.dumps(entry, ensure_ascii=False).encode() + b"\n" for entry in entries))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Another process may have the file now."""
        self._file.close()


async def run_lines(
    app: Any,
    source: Path,
    lines: list[Line],
    output: BatchOutput,
    *,
    max_concurrency: int,
    on_done: Callable[[bool], None],
    api_key: str | None = None,
) -> None:
    """Has all lines answered, at most `max_concurrency` at a time, and writes each answer once it is there.

    Args:
        app: An ASGI application.
        source: The input.
        lines: Of it.
        output: Where answers go.
        max_concurrency: Requests at a time.
        on_done: Called after each answer is written, with whether it is a good one.
        api_key: What the application asks for, if anything.

    Raises:
        EngineDeadError: The application has no engine any more; what is not answered is left for another run.
    """
    answers: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(max_concurrency)
    remaining = iter(lines)

    async def work(file: IO[bytes]) -> None:
        for line in remaining:
            file.seek(line.start)
            await answers.put(await _answer(app, file.read(line.num_bytes), line.number, api_key))

    async def write() -> None:
        is_last = False
        while not is_last:
            found = [await answers.get()]
            while not answers.empty():
                found.append(answers.get_nowait())
            is_last = None in found
            entries = [entry for entry in found if entry is not None]
            # In a thread, for a disk may take its time; one write at a time, so lines are whole and in order.
            await asyncio.to_thread(output.append, entries)
            for entry in entries:
                on_done(entry["error"] is None and entry["response"]["status_code"] == 200)

    with source.open("rb") as file:
        writing = asyncio.ensure_future(write())
        working = [asyncio.ensure_future(work(file)) for _ in range(min(max_concurrency, len(lines)))]
        everything = asyncio.gather(*working)
        try:
            await asyncio.wait((writing, everything), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()  # It ends before the work only if it can't write.
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(everything, *working, return_exceptions=True)
            # What was answered is kept, however this ends.
            if not writing.done():
                await answers.put(None)
            await asyncio.gather(writing, return_exceptions=True)
        writing.result()
        for task in working:
            task.result()


async def _answer(app: Any, data: bytes, number: int, api_key: str | None) -> dict[str, Any]:
    """The output's entry for a line."""
    entry: dict[str, Any] = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": None, "response": None, "error": None}
    try:
        request = parse_line(data)
    except InvalidLineError as error:
        problem = {"code": "invalid_line", "message": str(error), "line": number}
        return {**entry, "custom_id": error.custom_id, "error": problem}
    for _ in range(MAX_TRIES):
        status, headers, body = await call(app, request.url, request.body, api_key)
        if status != 503:
            break
        await asyncio.sleep(_seconds(headers.get(b"retry-after", b"")))
    else:
        raise EngineDeadError(
            f"The engine could not serve {request.custom_id!r} in {MAX_TRIES} tries: {body.decode(errors='replace')[:300]} "
            "Run the same command again to go on with what is left."
        )
    document = json.loads(body)
    request_id = document.get("id") or f"req_{secrets.token_hex(12)}"
    response = {"status_code": status, "request_id": request_id, "body": document}
    return {**entry, "custom_id": request.custom_id, "response": response}


async def call(app: Any, path: str, body: bytes, api_key: str | None) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of the application's answer to a POST of JSON."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if api_key is not None:
        headers.append((b"authorization", b"Bearer " + api_key.encode()))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 0),
        "server": ("localhost", 80),
    }
    incoming = iter([{"type": "http.request", "body": body, "more_body": False}])
    status, answered, parts = 500, {}, []

    async def receive() -> dict[str, Any]:
        for message in incoming:
            return message
        # The client stays: who waits for it to go waits until the answer is there, and is cancelled then.
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, answered
        if message["type"] == "http.response.start":
            status, answered = message["status"], dict(message["headers"])
        else:
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:
        if not parts:
            raise
        # A framework tells its client of an error that nobody foresaw, and raises it again for the server's log.
        logger.exception("A request to %s failed.", path)
    return status, answered, b"".join(parts)


def _is_utf8(text: str) -> bool:
    """Not so for half of a surrogate pair, which JSON can write and no file can have."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _seconds(retry_after: bytes) -> float:
    try:
        return min(max(float(retry_after), 0.1), 60.0)
    except ValueError:
        return RETRY_S
