"""What clients see of a server that ends before their answers do."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cacheflow import AsyncLLMServer
from cacheflow.config import EngineConfig
from cacheflow_openai.app import OpenAIFrontend, OpenAIOptions

DEADLINE_S = 180
LONG = {"stream": True, "ignore_eos": True, "temperature": 0}
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {**LONG, "prompt": "Let me", "max_tokens": 2000},
    "/v1/chat/completions": {**LONG, "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/responses": {**LONG, "input": "Hi"},
}


@pytest.fixture
def server(loop: Any, scripted_llama: Path) -> Any:
    config = EngineConfig(model=str(scripted_llama), dtype="float32", kv_cache_memory=0.05, disable_log_stats=True)
    server = loop.run(AsyncLLMServer.start(config))
    yield server
    loop.run(server.close())


def test_streams_that_are_cut_off_end_with_an_error_and_new_requests_are_refused(
    loop: Any, server: Any, app_client: Any
) -> None:
    client = app_client(OpenAIFrontend.create_app(server, OpenAIOptions()))
    with ThreadPoolExecutor(len(REQUESTS)) as threads:
        answers = {path: threads.submit(client.post, path, json=fields) for path, fields in REQUESTS.items()}
        deadline_s = time.monotonic() + DEADLINE_S
        while loop.run(server.stats()).num_running < len(REQUESTS):
            assert time.monotonic() < deadline_s
        loop.run(server.drain(0))
        texts = {path: answer.result(DEADLINE_S).text for path, answer in answers.items()}

    for path in ("/v1/completions", "/v1/chat/completions"):
        *chunks, told, done, rest = texts[path].split("\n\n")
        assert (len(chunks) > 0, done, rest) == (True, "data: [DONE]", "")
        assert not any('"error"' in chunk for chunk in chunks)
        assert json.loads(told.removeprefix("data: "))["error"]["code"] == "draining"

    *_, last, rest = texts["/v1/responses"].split("\n\n")
    name, data = last.split("\n")
    response = json.loads(data.removeprefix("data: "))["response"]
    assert (name, rest, response["status"]) == ("event: response.failed", "", "failed")
    assert response["error"]["code"] == "server_error"
    assert [item["status"] for item in response["output"]] == ["incomplete"]

    for path, fields in REQUESTS.items():
        refused = client.post(path, json=fields)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) >= 1
