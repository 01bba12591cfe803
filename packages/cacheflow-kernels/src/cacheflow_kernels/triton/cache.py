"""Writing keys and values into the paged cache, and copying its blocks. It knows nothing of attention.

Arguments are as in `ops`, which checks them. Offsets of blocks are 64-bit: a cache may hold more than 2^31 elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS_PER_PROGRAM = 1024
"""Words of a block that one program of `_move_blocks` moves. Not measured."""


@triton.jit
def _store_kv(
    k,
    v,
    k_cache,
    v_cache,
    slot_mapping,
    k_stride,
    k_head,
    v_stride,
    v_head,
    k_cache_block,
    k_cache_head,
    k_cache_slot,
    v_cache_block,
    v_cache_head,
    v_cache_slot,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
):
    """One token's key and value, all heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    head = tl.arange(0, PADDED_HEADS)[:, None]
    element = tl.arange(0, PADDED_SIZE)[None, :]
    inside = (head < NUM_HEADS) & (element < HEAD_SIZE)
    key = tl.load(k + token * k_stride + head * k_head + element, mask=inside)
    value = tl.load(v + token * v_stride + head * v_head + element, mask=inside)
    k_to = k_cache + block * k_cache_block + head * k_cache_head + offset * k_cache_slot + element
    v_to = v_cache + block * v_cache_block + head * v_cache_head + offset * v_cache_slot + element
    tl.store(k_to, key.to(k_cache.dtype.element_ty), mask=inside)
    tl.store(v_to, value.to(v_cache.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_pairs"])
def _move_blocks(
    caches,
    staging,
    pairs,
    num_pairs,
    cache_block,
    block_words,
    WORD: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_WRITE: tl.constexpr,
):
    """A piece of one pair's block in one cache: from its source to the staging memory, or from there to its destination."""
    pair, cache = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    block = tl.load(pairs + 2 * pair + (1 if IS_WRITE else 0))
    word = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = word < block_words
    base = tl.load(caches + cache).to(tl.pointer_type(WORD))
    in_cache = base + block * cache_block + word
    staged = staging + (cache * num_pairs + pair) * block_words + word
    if IS_WRITE:
        tl.store(in_cache, tl.load(staged, mask=inside), mask=inside)
    else:
        tl.store(staged, tl.load(in_cache, mask=inside), mask=inside)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """One program a token; a negative slot is not stored."""
    num_tokens, num_heads, head_size = k.shape
    if num_tokens == 0:
        return
    _store_kv[(num_tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=k_cache.shape[2],
        PADDED_HEADS=triton.next_power_of_2(num_heads),
        PADDED_SIZE=triton.next_power_of_2(head_size),
    )


def copy_blocks(caches: Sequence[Tensor], pairs: Tensor) -> None:
    """Two launches for all caches: every source is read into staging memory before the first destination is written.

    Raises:
        ValueError: The caches differ in shape, dtype or layout, or their blocks are not contiguous.
    """
    first = caches[0]
    layout = (first.shape[1:], first.stride(), first.dtype)
    if not first[0].is_contiguous() or any((c.shape[1:], c.stride(), c.dtype) != layout for c in caches):
        raise ValueError("caches must be alike in shape, dtype and strides, with contiguous blocks.")
    num_pairs = pairs.shape[0]
    if num_pairs == 0:
        return
    block_bytes = first[0].numel() * first.element_size()
    stride_bytes = first.stride(0) * first.element_size()
    word = torch.int32 if block_bytes % 4 == 0 and stride_bytes % 4 == 0 else torch.int8
    words = block_bytes // word.itemsize
    addresses = torch.tensor(
        [cache.data_ptr() for cache in caches], dtype=torch.int64, pin_memory=first.device.type == "cuda"
    ).to(first.device, non_blocking=True)
    staging = torch.empty(len(caches) * num_pairs * words, dtype=word, device=first.device)
    on_device = pairs.to(first.device, non_blocking=True).contiguous()
    grid = (triton.cdiv(words, _WORDS_PER_PROGRAM), num_pairs, len(caches))
    for is_write in (False, True):
        _move_blocks[grid](
            addresses,
            staging,
            on_device,
            num_pairs,
            stride_bytes // word.itemsize,
            words,
            WORD=tl.int32 if word == torch.int32 else tl.int8,
            CHUNK=_WORDS_PER_PROGRAM,
            IS_WRITE=is_write,
        )
