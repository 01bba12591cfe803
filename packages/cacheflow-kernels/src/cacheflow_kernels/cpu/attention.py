"""Calls of the C++ kernels on KV caches. Arguments are taken as `ops` or a plan has checked them; nothing is checked here.

It owns the C structures and the pointers in them; it knows neither the registry nor the engine.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cacheflow_kernels.cpu import library

MAX_HEAD_SIZE = 256
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element types of the kernels, as elements.h numbers them."""


class Batch(ctypes.Structure):
    """`Batch` of paged_attention.cpp. It borrows the tensors' memory: whoever makes it keeps them alive."""

    _fields_ = (
        ("query_start_loc", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("num_seqs", ctypes.c_int64),
    )

    @classmethod
    def of(cls, query_start_loc: Tensor, seq_lens: Tensor, block_tables: Tensor) -> Batch:
        """From contiguous int32 tensors; `block_tables` may have strided rows."""
        return cls(
            query_start_loc.data_ptr(), seq_lens.data_ptr(), block_tables.data_ptr(), block_tables.stride(0), len(seq_lens)
        )


class Layer(ctypes.Structure):
    """`Layer` of paged_attention.cpp; it borrows the slopes' memory."""

    _fields_ = (
        ("alibi_slopes", ctypes.c_void_p),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    )

    @classmethod
    def of(
        cls,
        sizes: tuple[int, int, int, int],
        dtype: torch.dtype,
        scale: float,
        window: int | None,
        alibi_slopes: Tensor | None,
        soft_cap: float | None,
    ) -> Layer:
        """For `sizes` (heads, kv heads, head size, block size) and contiguous slopes `[num_heads] float32`."""
        slopes = None if alibi_slopes is None else alibi_slopes.data_ptr()
        return cls(slopes, *sizes, window or 0, scale, soft_cap or 0.0, DTYPES[dtype])


class Plan(NamedTuple):
    """What the layers of one step share: its batch as the kernels read it, and the tensors whose memory that borrows.

    Attributes:
        batch: The batch.
        tensors: Starts, lengths and block tables.
        slot_mapping: Where new keys and values go, contiguous.
        layers: Each layer by its number.
    """

    batch: Batch
    tensors: tuple[Tensor, Tensor, Tensor]
    slot_mapping: Tensor
    layers: Mapping[int, Layer]


class Cache(NamedTuple):
    """Where keys and values `[num_blocks, num_kv_heads, block_size, head_size]` lie: addresses, and elements between blocks."""

    k: int
    v: int
    block_stride: int


POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64


@cache
def _kernels() -> ctypes.CDLL:
    loaded = library.load()
    assert loaded is not None, "called where library.reasons() says why not"
    batch, layer = ctypes.POINTER(Batch), ctypes.POINTER(Layer)
    loaded.cf_paged_attention.argtypes = (batch, layer, POINTER, INTEGER, POINTER, POINTER, INTEGER, POINTER)
    loaded.cf_store_kv.argtypes = (layer, *(POINTER, INTEGER) * 2, POINTER, POINTER, INTEGER, POINTER, INTEGER)
    loaded.cf_copy_blocks.argtypes = (POINTER, INTEGER, POINTER, INTEGER)
    for function in (loaded.cf_paged_attention, loaded.cf_store_kv, loaded.cf_copy_blocks):
        function.restype = None
    return loaded


def supports(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Why the kernels in this folder, `linear` apart, can't serve this device and dtype."""
    why_not = library.check_cpu(device)
    return why_not if dtype in DTYPES else (*why_not, f"needs float32, bfloat16 or float16, not {dtype}")


def attend(layer: Layer, q: Tensor, cache: Cache, batch: Batch) -> Tensor:
    """Attention of `q [num_tokens, num_heads, head_size]`, in its dtype, which is the cache's too."""
    if q.stride(1) != layer.head_size:
        q = q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype)
    _kernels().cf_paged_attention(batch, layer, q.data_ptr(), q.stride(0), *cache, out.data_ptr())
    return out


def store(layer: Layer, k: Tensor, v: Tensor, cache: Cache, slot_mapping: Tensor) -> None:
    """Writes `k` and `v [num_tokens, num_kv_heads, head_size]`, of the cache's dtype, to contiguous slots."""
    if k.stride(1) != layer.head_size or v.stride(1) != layer.head_size:
        k, v = k.contiguous(), v.contiguous()
    _kernels().cf_store_kv(
        layer, k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), *cache, slot_mapping.data_ptr(), len(slot_mapping)
    )


def copy_blocks(caches: Sequence[Tensor], pairs: Tensor) -> None:
    """`reference.copy_blocks`.

    Raises:
        ValueError: A cache that is not contiguous.
    """
    pairs = pairs.contiguous()
    for blocks in caches:
        if not blocks.is_contiguous():
            raise ValueError(f"caches must be contiguous, got strides {blocks.stride()} for {list(blocks.shape)}.")
        block_bytes = blocks.stride(0) * blocks.element_size()
        _kernels().cf_copy_blocks(blocks.data_ptr(), block_bytes, pairs.data_ptr(), len(pairs))


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """`reference.paged_attention`.

    Raises:
        ValueError: A cache of another dtype than q, or not contiguous within its blocks; or heads larger than the kernels'.
    """
    cache = _cache_of(k_cache, v_cache)
    if k_cache.dtype != q.dtype:
        raise ValueError(f"k_cache must be {q.dtype} like q, got {k_cache.dtype}.")
    slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
    _, num_kv_heads, block_size, head_size = k_cache.shape
    layer = Layer.of((q.shape[1], num_kv_heads, head_size, block_size), q.dtype, scale, window, slopes, soft_cap)
    starts, lens, tables = query_start_loc.contiguous(), seq_lens.contiguous(), block_tables.contiguous()
    return attend(layer, q, cache, Batch.of(starts, lens, tables))


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """`reference.store_kv`.

    Raises:
        ValueError: A cache that is not contiguous within its blocks; or heads larger than the kernels'.
    """
    cache = _cache_of(k_cache, v_cache)
    _, num_kv_heads, block_size, head_size = k_cache.shape
    layer = Layer.of((num_kv_heads, num_kv_heads, head_size, block_size), k_cache.dtype, 1.0, None, None, None)
    store(layer, k.to(k_cache.dtype), v.to(k_cache.dtype), cache, slot_mapping.contiguous())


def cache_of(kv: Tensor) -> Cache:
    """Of a layer's `[num_blocks, 2 (key, value), num_kv_heads, block_size, head_size]`."""
    address, block_stride = kv.data_ptr(), kv.stride(0)
    return Cache(address, address + block_stride * kv.element_size() // 2, block_stride)


def _cache_of(k_cache: Tensor, v_cache: Tensor) -> Cache:
    for name, blocks in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not blocks[:1].is_contiguous() or blocks.stride(0) != k_cache.stride(0):
            strides = blocks.stride()
            raise ValueError(f"{name} must be contiguous within each block, got strides {strides} for {list(blocks.shape)}.")
    if k_cache.shape[3] > MAX_HEAD_SIZE:
        raise ValueError(f"k_cache must have heads of at most {MAX_HEAD_SIZE} elements, got {k_cache.shape[3]}.")
    return Cache(k_cache.data_ptr(), v_cache.data_ptr(), k_cache.stride(0))
