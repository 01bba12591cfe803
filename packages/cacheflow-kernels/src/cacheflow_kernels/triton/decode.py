"""Attention of single query tokens over the paged cache, split over the context (flash-decoding, arXiv:2311.01282).

Splits have a fixed size and start at fixed positions of the context, tiles have a fixed size, and the partial results are put
together in order: what a sequence gets depends on nothing else in its batch, bit for bit. Sequences with another number of
query tokens are left to `prefill`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacheflow_kernels.triton.scores import add_tile, score

SPLIT = 256
"""Positions of one split: 2 x 64 KiB of a 128-wide fp16 cache to read against 0.5 KiB a query head of partial results to write.
One sequence of 4,096 positions over 8 kv heads gives 128 programs, about one for each multiprocessor. Not measured."""
_SPLITS_PER_TILE = 16
"""Partial results that the second kernel adds up at a time. Not measured."""


@triton.jit(do_not_specialize=["num_splits", "window", "table_row"])
def _attend_split(
    q,
    k_cache,
    v_cache,
    block_tables,
    seq_lens,
    query_start_loc,
    alibi_slopes,
    out,
    partial,
    maxima,
    sums,
    scale,
    window,
    soft_cap,
    num_splits,
    table_row,
    q_row,
    q_head,
    k_block,
    k_head,
    k_slot,
    v_block,
    v_head,
    v_slot,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
):
    """One split of one sequence for all query heads of one kv head, so that its keys and values are read once."""
    split, kv_head, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(query_start_loc + seq).to(tl.int64)
    num_queries = tl.load(query_start_loc + seq + 1) - row
    seq_len = tl.load(seq_lens + seq)
    lowest = tl.maximum(seq_len - window, 0)
    first_split, last_split = lowest // SPLIT, (seq_len - 1) // SPLIT
    if (num_queries != 1) | (split < first_split) | (split > last_split):
        return

    member = tl.arange(0, PADDED_GROUP)
    head = kv_head * GROUP + member
    element = tl.arange(0, PADDED_SIZE)
    is_query = (member[:, None] < GROUP) & (element[None, :] < HEAD_SIZE)
    queries = tl.load(q + row * q_row + head[:, None] * q_head + element[None, :], mask=is_query, other=0.0)
    slope = tl.zeros([PADDED_GROUP, 1], tl.float32)
    if HAS_ALIBI:
        slope += tl.load(alibi_slopes + head[:, None], mask=member[:, None] < GROUP, other=0.0)

    accumulator = tl.zeros([PADDED_GROUP, PADDED_SIZE], tl.float32)
    maximum = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    # Every tile has a position that is seen, so that no maximum stays infinite.
    start = tl.maximum(split * SPLIT, lowest // TILE * TILE)
    stop = tl.minimum((split + 1) * SPLIT, seq_len)
    for tile in range(start, stop, TILE):
        position = tile + tl.arange(0, TILE)
        is_seen = (position >= lowest) & (position < seq_len)
        block = tl.load(block_tables + seq.to(tl.int64) * table_row + position // BLOCK_SIZE, mask=is_seen, other=0)
        block = block.to(tl.int64)[:, None]
        slot = (position % BLOCK_SIZE)[:, None]
        is_key = is_seen[:, None] & (element[None, :] < HEAD_SIZE)
        keys = tl.load(k_cache + block * k_block + kv_head * k_head + slot * k_slot + element[None, :], mask=is_key, other=0.0)
        values = tl.load(
            v_cache + block * v_block + kv_head * v_head + slot * v_slot + element[None, :], mask=is_key, other=0.0
        )
        distance = (seq_len - 1 - position)[None, :]
        scores = score(queries, keys, scale, soft_cap, slope, distance, HAS_SOFT_CAP, HAS_ALIBI)
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        accumulator, maximum, total = add_tile(accumulator, maximum, total, scores, values, False)

    if first_split == last_split:
        place = out + (row * NUM_KV_HEADS * GROUP + head[:, None]) * HEAD_SIZE + element[None, :]
        tl.store(place, (accumulator / total[:, None]).to(out.dtype.element_ty), mask=is_query)
    else:
        part = (seq.to(tl.int64) * NUM_KV_HEADS * GROUP + head) * num_splits + split
        tl.store(partial + part[:, None] * HEAD_SIZE + element[None, :], accumulator, mask=is_query)
        tl.store(maxima + part, maximum, mask=member < GROUP)
        tl.store(sums + part, total, mask=member < GROUP)


@triton.jit(do_not_specialize=["num_splits", "window"])
def _add_splits(
    out,
    partial,
    maxima,
    sums,
    seq_lens,
    query_start_loc,
    window,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """One query head of one sequence: the splits' results, weighted by their share of the sum of exponentials."""
    head, seq = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(query_start_loc + seq).to(tl.int64)
    num_queries = tl.load(query_start_loc + seq + 1) - row
    seq_len = tl.load(seq_lens + seq)
    first_split, last_split = tl.maximum(seq_len - window, 0) // SPLIT, (seq_len - 1) // SPLIT
    if (num_queries != 1) | (first_split >= last_split):
        return

    element = tl.arange(0, PADDED_SIZE)
    accumulator = tl.zeros([PADDED_SIZE], tl.float32)
    maximum = -float("inf")
    total = 0.0
    for tile in range(first_split, last_split + 1, TILE):
        split = tile + tl.arange(0, TILE)
        is_split = split <= last_split
        part = (seq * NUM_HEADS + head) * num_splits + split
        part_maximum = tl.load(maxima + part, mask=is_split, other=float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(part_maximum, axis=0))
        shrink = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(part_maximum - new_maximum)
        total = total * shrink + tl.sum(weights * tl.load(sums + part, mask=is_split, other=0.0), axis=0)
        inside = is_split[:, None] & (element[None, :] < HEAD_SIZE)
        results = tl.load(partial + part[:, None] * HEAD_SIZE + element[None, :], mask=inside, other=0.0)
        accumulator = accumulator * shrink + tl.sum(weights[:, None] * results, axis=0)
        maximum = new_maximum
    place = out + (row * NUM_HEADS + head) * HEAD_SIZE + element
    tl.store(place, (accumulator / total).to(out.dtype.element_ty), mask=element < HEAD_SIZE)


def tile_size(padded_size: int, element_size: int) -> int:
    """Positions of one tile: of keys and values together 16 to 64 KiB. Not measured."""
    return max(16, min(64, 16384 // (padded_size * element_size)))


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    out: Tensor,
    scale: float,
    window: int,
    alibi_slopes: Tensor | None,
    soft_cap: float | None,
) -> None:
    """Fills the rows of `out`, contiguous, that belong to sequences of exactly one query token.

    The width of `block_tables` decides how many programs start, so that a captured launch serves every length it has room for.
    """
    _, num_heads, head_size = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_seqs = seq_lens.shape[0]
    num_splits = triton.cdiv(block_tables.shape[1] * block_size, SPLIT)
    group = num_heads // num_kv_heads
    padded_size = max(16, triton.next_power_of_2(head_size))
    parts = (num_seqs, num_heads, num_splits) if num_splits > 1 else (0,)
    partial = torch.empty(*parts, head_size, dtype=torch.float32, device=q.device)
    maxima, sums = (torch.empty(parts, dtype=torch.float32, device=q.device) for _ in range(2))
    _attend_split[(num_splits, num_kv_heads, num_seqs)](
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        alibi_slopes,
        out,
        partial,
        maxima,
        sums,
        scale,
        window,
        0.0 if soft_cap is None else soft_cap,
        num_splits,
        block_tables.stride(0),
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        PADDED_GROUP=max(16, triton.next_power_of_2(group)),
        HEAD_SIZE=head_size,
        PADDED_SIZE=padded_size,
        BLOCK_SIZE=block_size,
        SPLIT=SPLIT,
        TILE=tile_size(padded_size, k_cache.element_size()),
        HAS_ALIBI=alibi_slopes is not None,
        HAS_SOFT_CAP=soft_cap is not None,
        num_warps=4,
        num_stages=2,
    )
    if num_splits > 1:
        _add_splits[(num_heads, num_seqs)](
            out,
            partial,
            maxima,
            sums,
            seq_lens,
            query_start_loc,
            window,
            num_splits,
            NUM_HEADS=num_heads,
            HEAD_SIZE=head_size,
            PADDED_SIZE=padded_size,
            SPLIT=SPLIT,
            TILE=_SPLITS_PER_TILE,
            num_warps=4,
        )
