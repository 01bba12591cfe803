"""Paged attention: sequences of one query token through the CUDA kernel, prompt chunks through Triton's.

Which kernel a sequence goes to depends on its own number of query tokens only, and nothing is read back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from cacheflow_kernels.cuda import library
from cacheflow_kernels.cuda.library import INTEGER, LONG, POINTER, REAL

DTYPES = (torch.float16, torch.bfloat16)
HEAD_SIZES = (32, 64, 80, 96, 128, 160, 192, 256)
NO_WINDOW = 1 << 30
"""What the kernels take for a window without end."""

_paged_decode = library.function(
    "paged_decode", *[POINTER] * 10, *[LONG] * 4, *[INTEGER] * 7, REAL, REAL, INTEGER
)  # fmt: skip


def reasons(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Why paged attention can't run there."""
    found = list(library.check_device(device))
    if dtype not in DTYPES:
        found.append(f"{dtype} is neither float16 nor bfloat16")
    if find_spec("triton") is None:
        found.append("prompt chunks need triton, which is not installed (pip install 'cacheflow-kernels[triton]')")
    return tuple(found)


def is_compiled_for(head_size: int, block_size: int) -> bool:
    """Whether there is a kernel for these sizes."""
    return head_size in HEAD_SIZES and block_size & (block_size - 1) == 0


@dataclass(frozen=True)
class Workspace:
    """Memory for what the splits of a context contribute, of one batch.

    Attributes:
        partial: `[num_seqs, num_heads, max_splits, head_size] float32`.
        log_sums: `[num_seqs, num_heads, max_splits] float32`.
    """

    partial: Tensor
    log_sums: Tensor

    @classmethod
    def make(cls, num_seqs: int, num_heads: int, head_size: int, max_seq_len: int, device: torch.device) -> Workspace:
        """For sequences of up to `max_seq_len` positions."""
        loaded = library.load()
        assert loaded is not None
        splits = max(1, -(-max_seq_len // int(loaded.cacheflow_split_size())))
        # A context of one split is written where it belongs at once.
        shape = (num_seqs if splits > 1 else 0, num_heads, splits)
        return cls(
            torch.empty(*shape, head_size, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
        )


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor | None,
    out: Tensor,
    scale: float,
    window: int | None,
    alibi_slopes: Tensor | None,
    soft_cap: float | None,
    workspace: Workspace,
) -> None:
    """Fills the rows of `out`, contiguous, that belong to sequences of one query token.

    Args:
        q: As in `ops.paged_attention`, and so are the next four.
        k_cache: See there.
        v_cache: See there.
        block_tables: See there.
        seq_lens: See there.
        query_start_loc: See there; None: row i of `q` is sequence i's.
        out: Like `q`.
        scale: See there, and so for the next three.
        window: See there.
        alibi_slopes: See there; float32.
        soft_cap: See there.
        workspace: For as many sequences, as long as the longest of them.

    Raises:
        ValueError: An argument has a shape, dtype or stride that the kernel can't take.
        KernelError: CUDA refused the launch.
    """
    _, num_heads, head_size = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    _check(q, k_cache, v_cache, block_tables, alibi_slopes)
    # A lane reads two numbers of a head at once.
    if q.stride()[1:] != (head_size, 1) or q.stride(0) % 2 or q.data_ptr() % 4:
        q = q.contiguous()
    _paged_decode(
        q,
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        workspace.partial.data_ptr(),
        workspace.log_sums.data_ptr(),
        block_tables.data_ptr(),
        seq_lens.data_ptr(),
        None if query_start_loc is None else query_start_loc.data_ptr(),
        None if alibi_slopes is None else alibi_slopes.data_ptr(),
        q.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        block_tables.stride(0),
        seq_lens.shape[0],
        num_heads,
        num_kv_heads,
        head_size,
        block_size,
        workspace.log_sums.shape[2],
        0 if window is None else min(window, NO_WINDOW),
        scale,
        0.0 if soft_cap is None else soft_cap,
        library.DTYPES[q.dtype],
    )


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
    """As `ops.paged_attention`. Head and block sizes that the kernel is not compiled for are Triton's altogether."""
    from cacheflow_kernels.triton import attention as triton_attention
    from cacheflow_kernels.triton.prefill import paged_prefill

    if not is_compiled_for(q.shape[2], k_cache.shape[2]):
        batch = (block_tables, seq_lens, query_start_loc)
        return triton_attention.paged_attention(q, k_cache, v_cache, *batch, scale, window, alibi_slopes, soft_cap)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.shape[0] == 0:
        return out
    slopes = None if alibi_slopes is None else alibi_slopes.float()
    max_seq_len = block_tables.shape[1] * k_cache.shape[2]
    workspace = Workspace.make(seq_lens.shape[0], q.shape[1], q.shape[2], max_seq_len, q.device)
    paged_decode(
        q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, out, scale, window, slopes, soft_cap, workspace
    )  # fmt: skip
    longest_window = NO_WINDOW if window is None else min(window, NO_WINDOW)
    paged_prefill(
        q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, out, scale, longest_window, slopes, soft_cap
    )  # fmt: skip
    return out


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, alibi_slopes: Tensor | None) -> None:
    head_size, block_size = q.shape[2], k_cache.shape[2]
    library.require(head_size in HEAD_SIZES, "q", f"of a head size among {', '.join(map(str, HEAD_SIZES))}", q)
    library.require(q.dtype in DTYPES, "q", "float16 or bfloat16", q)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        library.require(cache.dtype == q.dtype, name, f"{q.dtype} like q", cache)
        library.require(block_size & (block_size - 1) == 0, name, "of a block size that is a power of two", cache)
        inner = (block_size * head_size, head_size, 1)
        is_readable = cache.stride()[1:] == inner and cache.stride(0) % 8 == 0 and cache.data_ptr() % 16 == 0
        library.require(is_readable, name, "contiguous within each block and aligned to 16 bytes", cache)
    library.require(block_tables.stride(1) == 1, "block_tables", "contiguous in its last axis", block_tables)
    if alibi_slopes is not None:
        library.require(alibi_slopes.dtype == torch.float32, "alibi_slopes", "float32", alibi_slopes)
