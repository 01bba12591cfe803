"""What both attention kernels share: how a tile of scores is made of queries and keys, and added to those before.

It knows neither blocks nor batches.
"""

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


@triton.jit
def add_tile(accumulator, maximum, total, scores, values, CAN_SEE_NOTHING: tl.constexpr):
    """The running sum of values, weighted by the exponentials of their scores, with a tile more (FlashAttention-2).

    `accumulator` is `[queries, head_size] float32`, `maximum` and `total` are `[queries]` of the scores so far, `scores` is
    `[queries, keys]`, `values [keys, head_size]`. A query that sees nothing of the tiles so far (`CAN_SEE_NOTHING`) has an
    infinite maximum, and inf - inf is no number.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) if CAN_SEE_NOTHING else new_maximum
    shrink = tl.exp2(maximum - finite)
    weights = tl.exp2(scores - finite[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    accumulator = accumulator * shrink[:, None]
    accumulator += tl.dot(weights.to(values.dtype), values, input_precision="tf32x3")
    return accumulator, new_maximum, total
