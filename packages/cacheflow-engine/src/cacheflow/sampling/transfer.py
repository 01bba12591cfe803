"""How a step's numbers get to the device and back without making the host wait for what the device is doing.

For a copy from ordinary memory the host waits, behind all the kernels that were launched before it. A copy from memory that is
locked into place ("pinned") is one more thing in the device's queue. On a CPU there is nothing to copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ALIGNMENT = 16
"""Bytes: what kernels read at a time. Pieces of a packed transfer begin at multiples of it."""


def to_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The values on the device; on a CPU their own memory."""
    return all_to_device([values], device)[0]


def all_to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Each array on the device, in one copy for all of them; on a CPU their own memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return unpack(pack(arrays, is_pinned=True).to(device, non_blocking=True), arrays)


def pack(arrays: Sequence[NDArray[Any]], *, is_pinned: bool) -> torch.Tensor:
    """The arrays one behind the other, as bytes."""
    packed = torch.empty(sum(map(_room, arrays)), dtype=torch.uint8, pin_memory=is_pinned)
    for target, array in zip(unpack(packed, arrays), arrays, strict=True):
        target.numpy()[...] = array
    return packed


def unpack(packed: torch.Tensor, arrays: Sequence[NDArray[Any]]) -> list[torch.Tensor]:
    """The parts of `packed` that have the places, shapes and dtypes of `arrays`."""
    parts, start = [], 0
    for array in arrays:
        dtype = torch.from_numpy(array[:0]).dtype
        parts.append(packed[start : start + array.nbytes].view(dtype).view(array.shape))
        start += _room(array)
    return parts


def _room(array: NDArray[Any]) -> int:
    return -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT


class Download:
    """A tensor on its way to the host. Later work on the device goes on beside it."""

    def __init__(self, values: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def result(self) -> torch.Tensor:
        """The values on the host: here, and only here, the host waits for the step."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
