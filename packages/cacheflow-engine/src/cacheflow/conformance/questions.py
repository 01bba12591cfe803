"""What an ordinary user of this machine would ask a plugin's `supports`, so that a table of plugins can show the answer.

Knows no plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _ordinary_cache() -> Any:
    """The KV cache of a small Llama, where this machine would put it."""
    import torch

    from cacheflow.interfaces import AttentionSpec, KVCacheSpec

    return KVCacheSpec(
        attention=(AttentionSpec(layer=0, scale=0.125),),
        num_heads=8,
        num_kv_heads=4,
        head_size=64,
        block_size=16,
        dtype=torch.bfloat16,
        device=_device(),
    )


def _ordinary_ops() -> Any:
    import torch

    from cacheflow.interfaces import OpSpec

    return OpSpec(dtype=torch.bfloat16, device=_device())


def _default_config() -> Any:
    from cacheflow.config import EngineConfig

    return EngineConfig()


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


QUESTIONS: dict[str, Callable[[], Any]] = {
    "cacheflow.attention_backends": _ordinary_cache,
    "cacheflow.op_providers": _ordinary_ops,
    "cacheflow.executors": _default_config,
    "cacheflow.logits_processors": _default_config,
}
"""What each group's `supports` is asked. A weight loader's question is a checkpoint, and there is none here."""
