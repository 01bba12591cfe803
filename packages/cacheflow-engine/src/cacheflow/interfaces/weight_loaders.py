"""The group `cacheflow.weight_loaders`: what reads a form of checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from cacheflow.types import TokenizerData

if TYPE_CHECKING:
    import torch


class WeightLoader(Protocol):
    """Reads one form of checkpoint. It never runs code that a checkpoint carries."""

    CONTRACT_VERSION: ClassVar[int]
    priority: ClassVar[int]
    """Of several that support a path, `auto` takes the one with the highest."""

    @classmethod
    def supports(cls, path: Path) -> tuple[str, ...]:
        """Why `path` (a folder, or one file) can't be read by this loader. Cheap: it opens no weights."""
        ...

    @classmethod
    def config(cls, path: Path) -> dict[str, Any]:
        """The checkpoint's configuration in the form of a Hugging Face `config.json`.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        ...

    @classmethod
    def tokenizer(cls, path: Path) -> TokenizerData:
        """The checkpoint's tokenizer.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        ...

    @classmethod
    def tensors(cls, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors under their Hugging Face names, on the CPU, each usable until the next one is asked for.

        Raises:
            CheckpointError: A file is truncated, corrupt or hostile.
        """
        ...
