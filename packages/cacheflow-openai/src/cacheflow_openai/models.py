"""What `/v1/models` tells of the one model that is served."""

from __future__ import annotations

from typing import Any

from cacheflow.types import ModelInfo


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
