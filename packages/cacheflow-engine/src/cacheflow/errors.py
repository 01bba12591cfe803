"""The errors a user of cacheflow can meet. Every message says what happened, the numbers, and what to do next."""

from __future__ import annotations

from typing import Any

MAX_SHOWN = 80
"""Characters of a value that a message shows."""


def shown(value: Any) -> str:
    """A value as messages show it: as Python writes it, and not too much of it."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


class CacheflowError(Exception):
    """The parent of every error that cacheflow raises on purpose."""


class InvalidRequestError(CacheflowError, ValueError):
    """A request that can't be served as it stands. An HTTP frontend answers 400.

    Attributes:
        param: The field that is at fault, or None.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConfigError(CacheflowError, ValueError):
    """An option of the engine or of a frontend that can't hold, alone or beside the others."""


class ModelNotFoundError(CacheflowError, FileNotFoundError):
    """A model that is neither a folder, nor a file, nor in the hub's cache, nor to be fetched."""


class CheckpointError(CacheflowError):
    """A checkpoint that is truncated, corrupt, hostile, or doesn't fit its configuration."""


class UnsupportedModelError(CacheflowError):
    """A model whose architecture no installed plugin implements."""


class NotEnoughMemoryError(CacheflowError):
    """Too little memory for the weights or for a useful KV cache."""


class PluginError(CacheflowError):
    """A plugin that is missing, claimed twice, made for another contract, or unable to run here."""


class EngineDeadError(CacheflowError):
    """The engine process ended or can't be reached. An HTTP frontend answers 503."""


class EngineOverloadedError(CacheflowError):
    """The engine's waiting room is full. An HTTP frontend answers 503 with Retry-After.

    Attributes:
        retry_after_s: When it is worth trying again, in seconds.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDrainingError(EngineOverloadedError):
    """The server or its engine is ending: it finishes what runs and takes nothing new. Another one may be there soon."""


class OutOfMemoryError(CacheflowError):
    """A step needs more memory than there is. An executor raises it; the engine then makes smaller steps."""


class RequestFailedError(CacheflowError):
    """A request that was accepted and then failed inside the engine. An HTTP frontend answers 500."""
