"""What the OpenAI frontend's tests share: a chat model that calls tools, on a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def chat_engine(loop: Any, scripted_llama: Path) -> Iterator[Any]:
    """A supervised engine that serves the scripted model."""
    from cacheflow import AsyncLLMServer
    from cacheflow.config import EngineConfig

    config = EngineConfig(model=str(scripted_llama), dtype="float32", kv_cache_memory=0.05, disable_log_stats=True)
    server = loop.run(AsyncLLMServer.start(config))
    yield server
    loop.run(server.close())


@pytest.fixture(scope="session")
def chat_client(chat_engine: Any, app_client: Any) -> Any:
    """A client of the frontend before it."""
    from cacheflow_openai.app import OpenAIFrontend, OpenAIOptions

    return app_client(OpenAIFrontend.create_app(chat_engine, OpenAIOptions(served_model_name=("scripted",))))
