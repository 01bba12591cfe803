"""What the frontends' tests share: a real engine with a tiny model, and a client that drives an application in process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import pytest

if TYPE_CHECKING:
    from cacheflow import AsyncLLMServer

T = TypeVar("T")


class LoopThread:
    """An event loop that runs all the time, as it does in a server."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=300)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class AppClient:
    """Sends requests to an ASGI application as a client over HTTP would."""

    def __init__(self, app: Any, loop: LoopThread) -> None:
        self._app = app
        self._loop = loop

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._loop.run(self._request(method, path, options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)

    def post_and_hang_up(self, path: str, body: bytes, after_parts: int) -> list[bytes]:
        """Posts, and hangs up once so many parts of the answer's body have come; returns those that came."""
        return self._loop.run(self._post_and_hang_up(path, body, after_parts))

    async def _request(self, method: str, path: str, options: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    async def _post_and_hang_up(self, path: str, body: bytes, after_parts: int) -> list[bytes]:
        parts: list[bytes] = []
        body_is_sent = False
        enough = asyncio.Event()
        if after_parts == 0:
            # The application is at work by then: the engine makes one step at least before the client goes.
            asyncio.get_running_loop().call_later(0.05, enough.set)

        async def receive() -> dict[str, Any]:
            nonlocal body_is_sent
            if not body_is_sent:
                body_is_sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await enough.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body" and message.get("body"):
                parts.append(message["body"])
                if len(parts) >= after_parts > 0:
                    enough.set()
                    await asyncio.sleep(0)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "server": ("localhost", 80),
            "client": ("127.0.0.1", 1),
        }
        await self._app(scope, receive, send)
        return parts


@pytest.fixture(scope="session")
def loop() -> Iterator[LoopThread]:
    """An event loop in a thread of its own."""
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="session")
def engine(loop: LoopThread, hub_cache: Path) -> Iterator[AsyncLLMServer]:
    """A supervised engine that serves the tiny facebook/opt-125m."""
    from cacheflow import AsyncLLMServer
    from cacheflow.config import EngineConfig

    config = EngineConfig(
        model="facebook/opt-125m", download_dir=str(hub_cache), dtype="float32", kv_cache_memory=0.05, disable_log_stats=True
    )
    server = loop.run(AsyncLLMServer.start(config))
    yield server
    loop.run(server.close())


@pytest.fixture(scope="session")
def app_client(loop: LoopThread) -> Callable[[Any], AppClient]:
    """Makes a client of an application."""
    return lambda app: AppClient(app, loop)
