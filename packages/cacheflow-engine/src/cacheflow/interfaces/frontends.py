"""The group `cacheflow.frontends`: an HTTP service over an engine."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol


class Frontend(Protocol):
    """An HTTP service over an engine, as an ASGI application. It sees token ids and text, never the scheduler or a model.

    `options` is a frozen dataclass of `cacheflow.config.option` fields; it has at least `host` and `port`.
    """

    CONTRACT_VERSION: ClassVar[int]
    options: ClassVar[type[Any]]

    @staticmethod
    def create_app(engine: Any, options: Any) -> Any:
        """The ASGI application.

        Args:
            engine: A started `cacheflow.AsyncLLMServer`; the launcher closes it.
            options: An instance of `options`.
        """
        ...
