"""The command of each system's OpenAI-compatible server: for W7, and for what it takes to start one.

All serve the same weights in bfloat16 and stand on 127.0.0.1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peers.environments import CORES, KV_CACHE_GB


def _cacheflow(folder: Path) -> list[str]:
    options = ["--dtype", "bfloat16", "--max-model-len", "2048", "--kv-cache-memory", str(KV_CACHE_GB)]
    return ["-m", "cacheflow", "serve", "openai", "--model", str(folder / "hf"), *options]


def _vllm(folder: Path) -> list[str]:
    options = ["--dtype", "bfloat16", "--max-model-len", "2048", "--disable-uvicorn-access-log"]
    return ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "hf"), *options]


def _llama_cpp(folder: Path) -> list[str]:
    options = ["--n_ctx", "2048", "--n_threads", str(len(CORES))]
    return ["-m", "llama_cpp.server", "--model", str(folder / "model-bf16.gguf"), *options]


def _transformers(folder: Path) -> list[str]:
    return ["-m", "transformers.cli.transformers", "serve", str(folder / "hf"), "--dtype", "bfloat16"]


SERVERS: dict[str, Callable[[Path], list[str]]] = {
    "cacheflow": _cacheflow,
    "vllm": _vllm,
    "llama-cpp": _llama_cpp,
    "transformers": _transformers,
}
"""By system: takes the folder of `model_files.py`; what the interpreter of its environment is given."""


def server(name: str, python: Path, folder: Path, port: int) -> list[str]:
    """The whole command."""
    return [str(python), *SERVERS[name](folder), "--host", "127.0.0.1", "--port", str(port)]
