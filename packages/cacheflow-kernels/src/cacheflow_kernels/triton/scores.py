"""What both attention kernels share: how a tile of scores is made of queries and keys. It knows neither blocks nor batches."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """From exp alone: the interpreter has no tanh, and of the GPU's there is only an approximate one."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def score(q, k, scale, soft_cap, slope, distance, HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr):
    """`[queries, keys]` scores times log2(e), so that their exponentials are powers of two, which the GPU has in hardware.

    `q` is `[queries, head_size]`, `k [keys, head_size]`, `slope [queries, 1]`, `distance` query minus key position. float32
    is multiplied in three tf32 products, which keep its precision: plain tf32, Triton's default, does not, and products outside
    the tensor cores need more registers than there are.
    """
    product = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
    if HAS_SOFT_CAP:
        product = soft_cap * tanh(product / soft_cap)
    if HAS_ALIBI:
        product -= slope * distance
    return product * _LOG2_E
