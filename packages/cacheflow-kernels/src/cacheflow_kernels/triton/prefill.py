"""Attention of prompt chunks over the paged cache, tile by tile (FlashAttention-2, arXiv:2307.08691).

A program owns some query tokens of one sequence and one head, and finds the sequence itself, so that nothing about a batch must
be known on the host. Tiles have a fixed size and start at the chunk's first token and at fixed positions of the context: what a
sequence gets depends on nothing else in its batch, bit for bit. Sequences of one query token are left to `decode`.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from cacheflow_kernels.triton.scores import add_tile, score


@triton.jit
def _attend_tiles(
    accumulator,
    maximum,
    total,
    queries,
    query_position,
    slope,
    start,
    stop,
    seq_len,
    window,
    scale,
    soft_cap,
    block_table,
    k_cache,
    v_cache,
    k_block,
    k_slot,
    v_block,
    v_slot,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Adds the positions `[start, stop)`; unless `IS_MASKED`, every query sees all of them."""
    element = tl.arange(0, PADDED_SIZE)[None, :]
    for tile in range(start, stop, TILE):
        position = tile + tl.arange(0, TILE)
        is_position = position < seq_len
        if IS_MASKED:
            block = tl.load(block_table + position // BLOCK_SIZE, mask=is_position, other=0)
        else:
            block = tl.load(block_table + position // BLOCK_SIZE)
        block = block.to(tl.int64)[:, None]
        slot = (position % BLOCK_SIZE)[:, None]
        k_from, v_from = k_cache + block * k_block + slot * k_slot, v_cache + block * v_block + slot * v_slot
        if IS_MASKED:
            is_key = is_position[:, None] & (element < HEAD_SIZE)
            keys, values = tl.load(k_from + element, mask=is_key, other=0.0), tl.load(v_from + element, mask=is_key, other=0.0)
        elif HEAD_SIZE < PADDED_SIZE:
            is_key = element < HEAD_SIZE
            keys, values = tl.load(k_from + element, mask=is_key, other=0.0), tl.load(v_from + element, mask=is_key, other=0.0)
        else:
            keys, values = tl.load(k_from + element), tl.load(v_from + element)
        distance = query_position[:, None] - position[None, :]
        scores = score(queries, keys, scale, soft_cap, slope, distance, HAS_SOFT_CAP, HAS_ALIBI)
        if IS_MASKED:
            scores = tl.where((distance >= 0) & (distance < window), scores, float("-inf"))
        accumulator, maximum, total = add_tile(accumulator, maximum, total, scores, values, IS_MASKED)
    return accumulator, maximum, total


@triton.jit(do_not_specialize=["num_seqs", "window", "table_row"])
def _attend_chunk(
    q,
    k_cache,
    v_cache,
    block_tables,
    seq_lens,
    query_start_loc,
    alibi_slopes,
    out,
    scale,
    window,
    soft_cap,
    num_seqs,
    table_row,
    q_row,
    q_head,
    k_block,
    k_head,
    k_slot,
    v_block,
    v_head,
    v_slot,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
):
    """`QUERIES` tokens of one sequence and one head. Heads of one group run side by side and share the cache's lines."""
    head = tl.program_id(0)
    # The last tiles see the longest context: they start first, so that they don't run alone at the end.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    # Sequence i owns the tiles from query_start_loc[i] // QUERIES + i on: the last one that starts at or before a tile has it.
    seq = tile * 0
    behind = num_seqs + seq
    while behind - seq > 1:
        middle = (seq + behind) // 2
        is_before = tl.load(query_start_loc + middle) // QUERIES + middle <= tile
        seq, behind = tl.where(is_before, middle, seq), tl.where(is_before, behind, middle)
    row = tl.load(query_start_loc + seq)
    num_queries = tl.load(query_start_loc + seq + 1) - row
    first = (tile - (row // QUERIES + seq)) * QUERIES
    if (num_queries <= 1) | (first >= num_queries):
        return

    seq_len = tl.load(seq_lens + seq)
    query = first + tl.arange(0, QUERIES)
    query_position = seq_len - num_queries + query
    element = tl.arange(0, PADDED_SIZE)
    is_query = (query[:, None] < num_queries) & (element[None, :] < HEAD_SIZE)
    token = (row + query).to(tl.int64)[:, None]
    queries = tl.load(q + token * q_row + head * q_head + element[None, :], mask=is_query, other=0.0)
    slope = tl.zeros([QUERIES, 1], tl.float32)
    if HAS_ALIBI:
        slope += tl.load(alibi_slopes + head)

    # Positions [start, stop) are seen by some query of these, [whole, masked) by all of them.
    first_position = seq_len - num_queries + first
    last_position = first_position + QUERIES - 1
    start = tl.maximum(first_position - window + 1, 0) // TILE * TILE
    stop = tl.minimum(last_position + 1, seq_len)
    masked = tl.maximum((first_position + 1) // TILE * TILE, start)
    whole = (tl.maximum(last_position - window + 1, 0) + TILE - 1) // TILE * TILE
    whole = tl.minimum(tl.maximum(whole, start), masked)

    kv_head = head // GROUP
    block_table = block_tables + seq.to(tl.int64) * table_row
    k_from, v_from = k_cache + kv_head * k_head, v_cache + kv_head * v_head
    accumulator = tl.zeros([QUERIES, PADDED_SIZE], tl.float32)
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    accumulator, maximum, total = _attend_tiles(
        accumulator, maximum, total, queries, query_position, slope, start, whole, seq_len, window, scale, soft_cap,
        block_table, k_from, v_from, k_block, k_slot, v_block, v_slot,
        HEAD_SIZE, PADDED_SIZE, BLOCK_SIZE, TILE, HAS_ALIBI, HAS_SOFT_CAP, True,
    )  # fmt: skip
    accumulator, maximum, total = _attend_tiles(
        accumulator, maximum, total, queries, query_position, slope, whole, masked, seq_len, window, scale, soft_cap,
        block_table, k_from, v_from, k_block, k_slot, v_block, v_slot,
        HEAD_SIZE, PADDED_SIZE, BLOCK_SIZE, TILE, HAS_ALIBI, HAS_SOFT_CAP, False,
    )  # fmt: skip
    accumulator, maximum, total = _attend_tiles(
        accumulator, maximum, total, queries, query_position, slope, masked, stop, seq_len, window, scale, soft_cap,
        block_table, k_from, v_from, k_block, k_slot, v_block, v_slot,
        HEAD_SIZE, PADDED_SIZE, BLOCK_SIZE, TILE, HAS_ALIBI, HAS_SOFT_CAP, True,
    )  # fmt: skip
    place = out + (token * NUM_HEADS + head) * HEAD_SIZE + element[None, :]
    tl.store(place, (accumulator / total[:, None]).to(out.dtype.element_ty), mask=is_query)


@dataclass(frozen=True)
class Tiles:
    """Query tokens and context positions of one tile, and how a program runs."""

    queries: int
    positions: int
    num_warps: int
    num_stages: int


def tiles(padded_size: int, element_size: int) -> Tiles:
    """Tile sizes for which a program fits into 99 KiB of shared memory, which GPUs of 8.6, 8.9 and 12.0 have. Not measured."""
    if element_size == 2:
        queries, positions = (128, 64) if padded_size <= 128 else (64, 32)
        return Tiles(queries=queries, positions=positions, num_warps=8, num_stages=2)
    queries, positions = (64, 32) if padded_size <= 64 else (32, 16)
    fits_twice = padded_size <= 128
    return Tiles(queries=queries, positions=positions, num_warps=4 if fits_twice else 8, num_stages=2 if fits_twice else 1)


def paged_prefill(
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
    """Fills the rows of `out`, contiguous, that belong to sequences of more than one query token."""
    num_tokens, num_heads, head_size = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_seqs = seq_lens.shape[0]
    padded_size = max(16, triton.next_power_of_2(head_size))
    sizes = tiles(padded_size, q.element_size())
    _attend_chunk[(num_heads, num_tokens // sizes.queries + num_seqs)](
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        alibi_slopes,
        out,
        scale,
        window,
        0.0 if soft_cap is None else soft_cap,
        num_seqs,
        block_tables.stride(0),
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        NUM_HEADS=num_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_SIZE=head_size,
        PADDED_SIZE=padded_size,
        BLOCK_SIZE=block_size,
        QUERIES=sizes.queries,
        TILE=sizes.positions,
        HAS_ALIBI=alibi_slopes is not None,
        HAS_SOFT_CAP=soft_cap is not None,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )
