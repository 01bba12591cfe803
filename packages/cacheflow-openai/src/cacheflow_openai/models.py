"""What `/v1/models` tells of the one model that is served."""

from __future__ import annotations

import hashlib
from typing import Any

from cacheflow.types import ModelInfo


def fingerprint(info: ModelInfo) -> str:
    """OpenAI's `system_fingerprint`: as long as it stays the same, the same seed should give the same answer."""
    known = (info.model, info.architecture, info.dtype, info.vocab_size, info.max_model_len, info.engine_version)
    return f"fp_{hashlib.sha256(repr(known).encode()).hexdigest()[:10]}"


def model_card(info: ModelInfo, name: str, created: int) -> dict[str, Any]:
    """The model as an OpenAI object.

    Args:
        info: What the engine says of it.
        name: What clients call it.
        created: Since when it is served, in seconds since the epoch.
    """
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "cacheflow",
        "root": info.model,
        "parent": None,
        "max_model_len": info.max_model_len,
    }
