"""cacheflow: high-throughput serving of large language models on a paged KV cache.

The public names are resolved when they are first used, so that importing the package costs milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cacheflow.async_server import AsyncLLMServer
    from cacheflow.llm import LLM
    from cacheflow.types import CompletionOutput, EmbeddingOutput, RequestOutput, SamplingParams, StructuredOutput

__all__ = [
    "LLM",
    "AsyncLLMServer",
    "CompletionOutput",
    "EmbeddingOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutput",
]

_HOMES = {
    "LLM": "cacheflow.llm",
    "AsyncLLMServer": "cacheflow.async_server",
    "SamplingParams": "cacheflow.types",
    "RequestOutput": "cacheflow.types",
    "CompletionOutput": "cacheflow.types",
    "EmbeddingOutput": "cacheflow.types",
    "StructuredOutput": "cacheflow.types",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
