"""Paged attention and the operations beside it, for any engine that keeps its KV cache in blocks.

Usable alone: this package needs torch and nothing of cacheflow's engine. The functions are in `ops`; what each one means is
written in plain torch in `reference`; `registry` says which implementations this machine can run and why not the others.
"""

from __future__ import annotations

from cacheflow_kernels import library as _library  # noqa: F401 (it registers the operations with torch)
from cacheflow_kernels.ops import (
    copy_blocks,
    draw_rows,
    fused_add_rms_norm,
    gelu_and_mul,
    layer_norm,
    linear,
    paged_attention,
    rms_norm,
    rotary,
    row_maxima,
    silu_and_mul,
    store_kv,
    swap_blocks,
)

__all__ = [
    "copy_blocks",
    "draw_rows",
    "fused_add_rms_norm",
    "gelu_and_mul",
    "layer_norm",
    "linear",
    "paged_attention",
    "rms_norm",
    "rotary",
    "row_maxima",
    "silu_and_mul",
    "store_kv",
    "swap_blocks",
]
