"""Reads folders with safetensors files, one or several with an index. Files are memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cacheflow.errors import CheckpointError
from cacheflow.interfaces import CONTRACT_VERSION
from cacheflow.loading.folder import has_weights, read_json, weight_files
from cacheflow.loading.tokenizer_files import read_tokenizer
from cacheflow.types import TokenizerData

if TYPE_CHECKING:
    import torch

_SINGLE, _PATTERN = "model.safetensors", "*.safetensors"


class SafetensorsLoader:
    """The weight loader `safetensors`."""

    CONTRACT_VERSION: ClassVar[int] = CONTRACT_VERSION
    priority: ClassVar[int] = 30

    @classmethod
    def supports(cls, path: Path) -> tuple[str, ...]:
        """Whether the folder has safetensors files."""
        return has_weights(path, _SINGLE, _PATTERN)

    @classmethod
    def config(cls, path: Path) -> dict[str, Any]:
        """`config.json`."""
        return read_json(path / "config.json")

    @classmethod
    def tokenizer(cls, path: Path) -> TokenizerData:
        """The folder's tokenizer files."""
        return read_tokenizer(path)

    @classmethod
    def tensors(cls, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors of all files. The library itself refuses headers that don't fit their file."""
        from safetensors import SafetensorError, safe_open

        for file in weight_files(path, _SINGLE, _PATTERN):
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                        yield name, tensors.get_tensor(name)
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{file} is truncated or corrupt: {error}. Fetch the file again.") from error
