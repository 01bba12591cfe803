"""Reads folders with `pytorch_model.bin` files, one or several with an index. Code in a file is refused, never run."""

from __future__ import annotations

import pickle
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

_SINGLE, _PATTERN = "pytorch_model.bin", "pytorch_model*.bin"


class BinLoader:
    """The weight loader `bin`."""

    CONTRACT_VERSION: ClassVar[int] = CONTRACT_VERSION
    priority: ClassVar[int] = 20

    @classmethod
    def supports(cls, path: Path) -> tuple[str, ...]:
        """Whether the folder has `pytorch_model.bin` files."""
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
        """All tensors of all files, memory-mapped where the file's form allows."""
        for file in weight_files(path, _SINGLE, _PATTERN):
            yield from _load(file).items()


def _load(file: Path) -> dict[str, torch.Tensor]:
    """One file's tensors.

    Raises:
        CheckpointError: It is damaged, or holds anything but tensors by name.
    """
    import torch

    try:
        # Files written before torch 1.6 are no zip archives and can't be mapped.
        with file.open("rb") as opened:
            is_archive = opened.read(4) == b"PK\x03\x04"
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        # torch wraps what it met into advice to trust the file, which nobody should follow.
        reason = str(error.__context__ or "").split(". ")[0].strip().rstrip(".") or "not a pickle of tensors"
        raise CheckpointError(
            f"{file} is corrupt, or holds code or objects besides tensors, which are never loaded ({reason}). "
            f"Use a safetensors version of the model."
        ) from error
    except Exception as error:  # What unpickling damaged bytes raises is not bounded.
        raise CheckpointError(f"{file} is truncated or corrupt: {type(error).__name__}: {error}. Fetch it again.") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{file} does not hold tensors by name. Use a safetensors version of the model.")
    return state
