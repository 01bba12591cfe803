"""The routes about a server itself, over ASGI and beside an engine that is only its state."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from cacheflow import status
from cacheflow.edge import EdgeOptions
from cacheflow.entrypoints.http_server import _Door
from cacheflow.errors import EngineDeadError
from cacheflow.metrics import Metrics
from cacheflow.status import StatusRoutes, metrics_app
from cacheflow.types import EngineStats, ModelInfo, TokenizerData

INFO = ModelInfo(
    model="tiny", architecture="A", dtype="float32", vocab_size=10, max_model_len=100, max_num_seqs=4,
    tokenizer=TokenizerData(tokenizer_json="{}"), engine_version="0",
)  # fmt: skip
ORIGIN = "https://a.example"


class Engine:
    """The state that the routes ask for."""

    def __init__(self, *, is_ready: bool = True, is_draining: bool = False) -> None:
        self.is_ready = is_ready
        self.is_draining = is_draining
        self.model_info = INFO
        self.metrics = Metrics(INFO)

    async def stats(self) -> EngineStats:
        if not self.is_ready:
            raise EngineDeadError("The engine is gone.")
        return EngineStats(**dict.fromkeys(EngineStats.__dataclass_fields__, 1))


async def app_behind(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def ask(app: Any, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("state", "ready"),
    [({}, 200), ({"is_ready": False}, 503), ({"is_draining": True}, 503)],
)
def test_health_is_the_process_and_readiness_is_the_engine(state: dict[str, bool], ready: int) -> None:
    routes = StatusRoutes(app_behind, Engine(**state))
    assert ask(routes, "/health").status_code == 200
    answer = ask(routes, "/health/ready")
    assert answer.status_code == ready
    if ready == 503:
        assert answer.json()["error"]["code"] == "not_ready"
        assert answer.headers["retry-after"] == "1"


def test_metrics_go_on_without_the_engine_and_statistics_say_that_it_is_gone() -> None:
    routes = StatusRoutes(app_behind, Engine(is_ready=False))
    assert 'cacheflow:engine_up{model_name="tiny"} 0.0' in ask(routes, "/metrics").text
    answer = ask(routes, "/stats")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")


def test_statistics_are_the_engines_counts_and_the_recent_latencies() -> None:
    document = ask(StatusRoutes(app_behind, Engine()), "/stats").json()
    assert document["model"] == "tiny"
    assert document["engine"]["num_running"] == 1
    assert document["latency"]["ttft_s"] is None


@pytest.mark.parametrize("path", ["/stats", "/stats/view"])
def test_a_reading_that_a_long_step_holds_up_is_given_up(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    class Busy(Engine):
        async def stats(self) -> EngineStats:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

        view = stats

    monkeypatch.setattr(status, "READING_TIMEOUT_S", 0.05)
    answer = ask(StatusRoutes(app_behind, Busy()), path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")


def test_only_get_is_possible_and_a_head_has_no_body() -> None:
    routes = StatusRoutes(app_behind, Engine())
    answer = ask(routes, "/metrics", "POST")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert ask(routes, "/health", "HEAD").content == b""


def test_every_other_path_is_the_applications() -> None:
    routes = StatusRoutes(app_behind, Engine())
    assert [ask(routes, path).status_code for path in ("/", "/healthy", "/metrics/", "/generate")] == [204] * 4


def test_a_metrics_port_has_metrics_and_health_without_a_key_and_nothing_else() -> None:
    open_door, closed = metrics_app(Engine(), EdgeOptions()), metrics_app(Engine(), EdgeOptions(api_key=("k",)))
    for app in (open_door, closed):
        assert [ask(app, path).status_code for path in ("/metrics", "/health", "/health/ready")] == [200] * 3
    assert ask(open_door, "/stats").status_code == 404
    assert ask(closed, "/stats").status_code == 401


def test_while_the_engine_loads_a_server_lives_and_is_not_ready_for_web_pages_either() -> None:
    door = _Door(EdgeOptions(allowed_origins=(ORIGIN,)))
    assert ask(door, "/health").status_code == 200
    for path in ("/health/ready", "/generate", "/v1/models"):
        answer = ask(door, path, origin=ORIGIN)
        assert (answer.status_code, json.loads(answer.text)["error"]["code"]) == (503, "not_ready")
        assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert ask(door, "/generate", origin="https://b.example").status_code == 403
