"""Memory for packed weights: blocks of huge pages, which matrices share in the order in which they are packed.

Reading weights in order is what a product of few rows spends its time on, and pages of 4 KiB cost it a fifth of the machine's
bandwidth. Single matrices are often smaller than a huge page, so many lie in one block. It does not know what is in a weight.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_BLOCK = 64 << 20
"""Bytes that are reserved at a time. Only pages that were written take memory, so the end of the last block costs nothing."""
_LINE = 64

_lock = threading.Lock()
# Weak: tensors keep their block, and with the last of them it goes.
_block: weakref.ref[mmap.mmap] | None = None
_used = 0


def place(tensor: Tensor) -> Tensor:
    """A contiguous copy at the next free cache line; the tensor itself where it has no elements."""
    num_bytes = tensor.numel() * tensor.element_size()
    if not num_bytes:
        return tensor
    memory, offset = _reserve(-(-num_bytes // _LINE) * _LINE)
    return torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape).copy_(tensor)


def _reserve(num_bytes: int) -> tuple[mmap.mmap, int]:
    """So many bytes: the block that they are in, and their place in it."""
    global _block, _used
    with _lock:
        memory = None if _block is None else _block()
        if memory is None or _used + num_bytes > len(memory):
            size = max(_BLOCK, -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE)
            memory, _used = _new_block(size)
            _block = weakref.ref(memory)
        offset, _used = _used, _used + num_bytes
        return memory, offset


def _new_block(num_bytes: int) -> tuple[mmap.mmap, int]:
    """A block, and where in it a huge page begins, from which on it has that many bytes."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, num_bytes), 0
    # Private: of shared memory, which is what Python maps otherwise, the kernel makes no huge pages unless it is told to.
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
    # A kernel without huge pages says so; its pages do as well.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, start
