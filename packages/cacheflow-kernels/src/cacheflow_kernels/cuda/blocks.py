"""Writing into the paged cache, and copying its blocks. Arguments are as in `ops`, which checks them.

It knows nothing of attention.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from cacheflow_kernels.cuda import library
from cacheflow_kernels.cuda.library import INTEGER, LONG, POINTER

_store_kv = library.function("store_kv", *[POINTER] * 5, *[LONG] * 6, *[INTEGER] * 4)
_copy_blocks = library.function("copy_blocks", POINTER, INTEGER, POINTER, INTEGER, LONG)
_swap_blocks = library.function("swap_blocks", POINTER, POINTER, INTEGER, POINTER, INTEGER, LONG)


def reasons(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Why these operations can't run there. Bytes are moved: every dtype will do."""
    return library.check_device(device)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """A block of threads a token; a negative slot is not stored.

    Raises:
        ValueError: A cache is not contiguous within each block.
        KernelError: CUDA refused the launch.
    """
    num_tokens, num_kv_heads, head_size = k.shape
    block_size, item = k_cache.shape[2], k_cache.element_size()
    k, v = k.to(k_cache.dtype), v.to(v_cache.dtype)
    inner = (block_size * head_size, head_size, 1)
    library.require(k_cache.stride()[1:] == inner, "k_cache", "contiguous within each block", k_cache)
    library.require(v_cache.stride()[1:] == inner, "v_cache", "contiguous within each block", v_cache)
    _store_kv(
        k_cache,
        k.data_ptr(),
        v.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slot_mapping.data_ptr(),
        *(stride * item for x in (k, v) for stride in x.stride()[:2]),
        k_cache.stride(0) * item,
        v_cache.stride(0) * item,
        num_tokens,
        num_kv_heads,
        block_size,
        head_size * item,
    )


def copy_blocks(caches: Sequence[Tensor], pairs: Tensor) -> None:
    """One launch for all caches. When a destination is a source as well, or blocks are no multiples of 16 bytes, torch copies.

    Raises:
        ValueError: The caches differ in shape or dtype, or are not contiguous.
        KernelError: CUDA refused the launch.
    """
    first = caches[0]
    block_bytes = _block_bytes(caches, first, "caches")
    sources, destinations = pairs.cpu().unbind(1)
    on_device = pairs.to(first.device, non_blocking=True).contiguous()
    if block_bytes % 16 or torch.isin(destinations, sources).any():
        for cache in caches:
            cache[on_device[:, 1]] = cache[on_device[:, 0]]
        return
    _copy_blocks(first, _addresses(caches), len(caches), on_device.data_ptr(), len(pairs), block_bytes)


def swap_blocks(source: Tensor, destination: Tensor, pairs: Tensor) -> None:
    """As `swap_all`, for one cache."""
    swap_all([source], [destination], pairs)


def swap_all(sources: Sequence[Tensor], destinations: Sequence[Tensor], pairs: Tensor) -> None:
    """A copy by the driver for each run of consecutive blocks of each cache. It returns when all are done.

    Raises:
        ValueError: The caches differ in shape or dtype, or are not contiguous.
        KernelError: CUDA refused a copy.
    """
    first = sources[0]
    block_bytes = _block_bytes(sources, first, "source")
    _block_bytes(destinations, first, "destination")
    on_host = pairs.cpu().contiguous()
    where = first if first.device.type == "cuda" else destinations[0]
    addresses = _addresses(sources), _addresses(destinations)
    _swap_blocks(where, *addresses, len(sources), on_host.data_ptr(), len(pairs), block_bytes)


def _block_bytes(caches: Sequence[Tensor], first: Tensor, name: str) -> int:
    for cache in caches:
        is_alike = cache.shape[1:] == first.shape[1:] and cache.dtype == first.dtype and cache.is_contiguous()
        library.require(is_alike, name, f"contiguous [num_blocks, *{list(first.shape[1:])}] {first.dtype}", cache)
    return first[0].numel() * first.element_size()


def _addresses(caches: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(caches))(*(cache.data_ptr() for cache in caches))
