"""Paged attention of any batch: single query tokens through `decode`, prompt chunks through `prefill`.

Which kernel a sequence goes to depends on its own number of query tokens only. Nothing is read back from the device, so that a
call can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cacheflow_kernels.triton import MAX_HEAD_SIZE
from cacheflow_kernels.triton.decode import paged_decode
from cacheflow_kernels.triton.prefill import paged_prefill

_NO_WINDOW = 1 << 30


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
    max_query_len: int | None = None,
    num_decodes: int | None = None,
) -> Tensor:
    """As `ops.paged_attention`. What the caller knows about the batch saves programs that would find nothing to do.

    Args:
        q: As in `ops`, and so are the next nine.
        k_cache: See there.
        v_cache: See there.
        block_tables: See there.
        seq_lens: See there.
        query_start_loc: See there.
        scale: See there.
        window: See there.
        alibi_slopes: See there.
        soft_cap: See there.
        max_query_len: No sequence has more query tokens; None: as many as `q`.
        num_decodes: How many sequences have exactly one query token; None: unknown.

    Raises:
        ValueError: The head size is above `MAX_HEAD_SIZE`.
    """
    if q.shape[2] > MAX_HEAD_SIZE:
        raise ValueError(f"head_size must be at most {MAX_HEAD_SIZE} for the triton kernels, got {q.shape[2]}.")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.shape[0] == 0 or seq_lens.shape[0] == 0:
        return out
    window = _NO_WINDOW if window is None else min(window, _NO_WINDOW)
    batch = (q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, out, scale, window, alibi_slopes, soft_cap)
    if num_decodes != 0:
        paged_decode(*batch)
    if max_query_len != 1:
        paged_prefill(*batch)
    return out
