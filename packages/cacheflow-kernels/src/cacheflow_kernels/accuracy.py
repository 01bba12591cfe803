"""How near an implementation is to the specification: the error measure, the limits per dtype, and awkward cases.

An error is RMS(out - reference) / RMS(reference), with the reference computed in float64. Tests and benchmarks share these
cases, so that what is timed is also what is checked. This module knows no implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LIMITS: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 6e-4,
    torch.bfloat16: 5e-3,
}
"""Most relative error per dtype: twice the worst that the reference itself scores over all cases here (float32 4e-7,
float16 3e-4, bfloat16 2.3e-3), which computes in float32 and rounds once."""


def relative_rms(out: Tensor, expected: Tensor) -> float:
    """RMS(out - expected) / RMS(expected), in float64; the plain RMS of `out` where `expected` is all zeros."""
    assert out.shape == expected.shape, f"shapes differ: {list(out.shape)} and {list(expected.shape)}"
    wanted = expected.double()
    error = (out.double() - wanted).square().mean().sqrt()
    size = wanted.square().mean().sqrt()
    return float(error / size) if size > 0 else float(error)


@dataclass(frozen=True, kw_only=True)
class PagedCase:
    """One batch for `paged_attention` and `store_kv`.

    Attributes:
        name: What is awkward about it.
        query_lens: Query tokens of each sequence; 0 is padding.
        context_lens: Positions of each sequence that come before them.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_size: Elements of one head.
        block_size: Slots of one block.
        window: As in `paged_attention`.
        has_alibi: Whether there are slopes.
        soft_cap: As in `paged_attention`.
    """

    name: str
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    window: int | None = None
    has_alibi: bool = False
    soft_cap: float | None = None


@dataclass(frozen=True, kw_only=True)
class PagedInputs:
    """The tensors of a `PagedCase`. The cache holds every position; slots that no sequence owns are NaN."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    alibi_slopes: Tensor | None

    def to(self, dtype: torch.dtype) -> PagedInputs:
        """The same numbers with q and the cache in `dtype`."""
        return PagedInputs(
            q=self.q.to(dtype),
            k_cache=self.k_cache.to(dtype),
            v_cache=self.v_cache.to(dtype),
            block_tables=self.block_tables,
            seq_lens=self.seq_lens,
            query_start_loc=self.query_start_loc,
            alibi_slopes=self.alibi_slopes,
        )


PAGED_CASES: tuple[PagedCase, ...] = (
    PagedCase(name="one token without context", query_lens=(1,), context_lens=(0,)),
    PagedCase(name="one decode", query_lens=(1,), context_lens=(37,)),
    PagedCase(name="decodes of uneven length", query_lens=(1, 1, 1, 1), context_lens=(0, 15, 16, 100)),
    PagedCase(name="a context that ends with its block", query_lens=(1, 1), context_lens=(15, 31)),
    PagedCase(name="whole prompts", query_lens=(5, 16, 33), context_lens=(0, 0, 0)),
    PagedCase(name="prompt chunks behind cached ones", query_lens=(7, 1, 20), context_lens=(16, 3, 45)),
    PagedCase(name="decodes and chunks in one batch", query_lens=(1, 1, 1, 13, 40), context_lens=(70, 1, 129, 0, 9)),
    PagedCase(name="padding sequences", query_lens=(1, 0, 3, 0), context_lens=(20, 0, 4, 0)),
    PagedCase(name="one kv head", query_lens=(1, 9), context_lens=(30, 2), num_heads=8, num_kv_heads=1),
    PagedCase(name="as many kv heads as heads", query_lens=(1, 9), context_lens=(30, 2), num_heads=3, num_kv_heads=3),
    PagedCase(name="9 heads over 3", query_lens=(1, 9), context_lens=(30, 2), num_heads=9, num_kv_heads=3),
    PagedCase(name="head size 32, block size 8", query_lens=(1, 11), context_lens=(50, 6), head_size=32, block_size=8),
    PagedCase(name="head size 80, block size 32", query_lens=(1, 11), context_lens=(50, 6), head_size=80, block_size=32),
    PagedCase(name="head size 128", query_lens=(1, 11), context_lens=(50, 6), head_size=128),
    PagedCase(name="head size 256, block size 1", query_lens=(1, 4), context_lens=(10, 2), head_size=256, block_size=1),
    PagedCase(name="window shorter than a block", query_lens=(1, 12), context_lens=(40, 30), window=5),
    PagedCase(name="window of one", query_lens=(1, 6), context_lens=(20, 3), window=1),
    PagedCase(name="window longer than the context", query_lens=(1, 12), context_lens=(8, 0), window=100),
    PagedCase(name="alibi", query_lens=(1, 12), context_lens=(60, 30), has_alibi=True),
    PagedCase(name="soft cap", query_lens=(1, 12), context_lens=(60, 30), soft_cap=2.0),
    PagedCase(
        name="window, alibi and soft cap", query_lens=(1, 12), context_lens=(60, 30), window=9, has_alibi=True, soft_cap=5.0
    ),
    PagedCase(name="a long context", query_lens=(1, 2), context_lens=(1500, 700)),
)
"""Batches that have caught errors in paged attention, here or elsewhere."""


def paged_inputs(case: PagedCase, seed: int = 0, device: str = "cpu") -> PagedInputs:
    """The tensors of a case in float64, with blocks dealt out in random order."""
    generator = torch.Generator().manual_seed(seed)
    seq_lens = [query + context for query, context in zip(case.query_lens, case.context_lens, strict=True)]
    blocks_needed = [-(-length // case.block_size) for length in seq_lens]
    num_blocks = sum(blocks_needed) + 3
    order = torch.randperm(num_blocks, generator=generator, dtype=torch.int32)
    tables = torch.full((len(seq_lens), max(blocks_needed) + 2), -1, dtype=torch.int32)
    shape = (num_blocks, case.num_kv_heads, case.block_size, case.head_size)
    k_cache, v_cache = (torch.full(shape, float("nan"), dtype=torch.float64) for _ in range(2))
    next_block = 0
    for i, count in enumerate(blocks_needed):
        tables[i, :count] = order[next_block : next_block + count]
        next_block += count
        for position in range(seq_lens[i]):
            block, slot = int(tables[i, position // case.block_size]), position % case.block_size
            for cache in (k_cache, v_cache):
                cache[block, :, slot] = torch.randn(shape[1], shape[3], generator=generator, dtype=torch.float64)
    starts = torch.tensor([0, *case.query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q = torch.randn(sum(case.query_lens), case.num_heads, case.head_size, generator=generator, dtype=torch.float64)
    slopes = 2.0 ** -torch.arange(1, case.num_heads + 1, dtype=torch.float32) if case.has_alibi else None
    return PagedInputs(
        q=q.to(device),
        k_cache=k_cache.to(device),
        v_cache=v_cache.to(device),
        block_tables=tables.to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        query_start_loc=starts.to(device),
        alibi_slopes=None if slopes is None else slopes.to(device),
    )


ROW_SHAPES: tuple[tuple[int, ...], ...] = ((1, 8), (1, 576), (3, 64), (7, 130), (33, 1536), (2, 3, 96))
"""Shapes `[..., size]` for the operations that work on rows, with even sizes of which most are no power of two."""


def rows(shape: tuple[int, ...], seed: int = 0, device: str = "cpu") -> Iterator[Tensor]:
    """Random float64 rows of the shape, one after the other: contiguous, then with a stride between rows, then large ones."""
    generator = torch.Generator().manual_seed(seed)
    yield torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)
    wider = torch.randn(*shape[:-1], shape[-1] + 6, generator=generator, dtype=torch.float64).to(device)
    yield wider[..., : shape[-1]]
    yield 50 * torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)
