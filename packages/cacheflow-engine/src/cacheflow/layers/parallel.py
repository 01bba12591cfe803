"""The ranks that share one layer. A layer asks its group; it does not know how ranks talk to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class ParallelGroup(Protocol):
    """The ranks among which the matrices of a layer are split."""

    @property
    def rank(self) -> int:
        """This process's number in the group, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many ranks there are."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor; the given one may be overwritten."""
        ...

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor, side by side along the last axis, in the order of ranks."""
        ...


class SingleRank:
    """The group of a model that is not split."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor
