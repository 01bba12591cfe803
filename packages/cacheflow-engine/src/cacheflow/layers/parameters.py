"""Parameters: where each checkpoint tensor goes, and which share of it a rank holds.

This module knows names, shapes and shards; it does not know what a parameter is used for, nor how files are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cacheflow.errors import CheckpointError, NotEnoughMemoryError

_STORED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Shard:
    """One rank's share of a checkpoint tensor: an equal part of one axis, or all of it.

    Where the ranks don't divide the axis, the last shares are shorter and padded to the common length: `cut` gives what is
    there, `local_shape` what is kept.

    Attributes:
        shape: Of the whole tensor.
        axis: The axis that is divided; None: every rank holds the whole.
        rank: Whose share this is.
        num_ranks: Among how many.
    """

    shape: tuple[int, ...]
    axis: int | None = None
    rank: int = 0
    num_ranks: int = 1

    @property
    def length(self) -> int:
        """Elements of the divided axis that each rank keeps, padding included."""
        assert self.axis is not None
        return -(-self.shape[self.axis] // self.num_ranks)

    @property
    def start(self) -> int:
        """The first element of the divided axis in this share."""
        return self.rank * self.length

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the share as it is kept."""
        if self.axis is None:
            return self.shape
        return (*self.shape[: self.axis], self.length, *self.shape[self.axis + 1 :])

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The share, as a view of `whole`, without padding."""
        if self.axis is None:
            return whole
        return whole[(slice(None),) * self.axis + (slice(self.start, self.start + self.length),)]

    def join(self, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor from what all ranks keep, in their order: the inverse of `cut`."""
        if self.axis is None:
            return kept[0]
        return torch.cat(tuple(kept), self.axis).narrow(self.axis, 0, self.shape[self.axis])


class Parameter:
    """One tensor of this rank. It is filled from one checkpoint tensor, or from several stacked along the first axis.

    Attributes:
        tensor: The rank's values.
        missing: Names of checkpoint tensors that have not come yet.
    """

    def __init__(self, parts: Mapping[str, Shard], dtype: torch.dtype, device: torch.device) -> None:
        self._parts: dict[str, tuple[Shard, int]] = {}
        num_rows, is_padded = 0, False
        for name, shard in parts.items():
            self._parts[name] = (shard, num_rows)
            num_rows += shard.local_shape[0]
            is_padded |= shard.axis is not None and shard.length * shard.num_ranks != shard.shape[shard.axis]
        make = torch.zeros if is_padded else torch.empty
        shape = (num_rows, *shard.local_shape[1:])
        try:
            self.tensor = make(shape, dtype=dtype, device=device)
        except RuntimeError as error:
            num_gib = math.prod(shape) * dtype.itemsize / 2**30
            raise NotEnoughMemoryError(
                f"{next(iter(parts))} {list(shape)} takes {num_gib:.1f} GiB, for which {device} has no room ({error}). "
                f"Choose a smaller model, --dtype half, or a larger --tensor-parallel-size."
            ) from error
        self.missing = set(parts)

    @property
    def shards(self) -> dict[str, Shard]:
        """The checkpoint tensors that fill it."""
        return {name: shard for name, (shard, _) in self._parts.items()}

    def part(self, name: str) -> torch.Tensor:
        """The rows that come from one checkpoint tensor, as a view."""
        shard, start = self._parts[name]
        return self.tensor[start : start + shard.local_shape[0]]

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Copies this rank's share of a checkpoint tensor into its place, cast to the parameter's dtype.

        Raises:
            CheckpointError: Its shape is not the declared one, or it does not hold plain floating-point numbers.
        """
        shard, _ = self._parts[name]
        if tuple(tensor.shape) != shard.shape:
            raise CheckpointError(
                f"The checkpoint's tensor {name} has the shape {list(tensor.shape)}, but its configuration asks for "
                f"{list(shard.shape)}. The weights and config.json don't belong together."
            )
        if tensor.dtype not in _STORED_DTYPES:
            raise CheckpointError(
                f"The checkpoint's tensor {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, which is a quantised "
                f"form that is not supported. Use a float32, float16 or bfloat16 checkpoint, or a GGUF file."
            )
        share = shard.cut(tensor)
        place = self.part(name)
        place[tuple(slice(length) for length in share.shape)].copy_(share)
        self.missing.discard(name)
