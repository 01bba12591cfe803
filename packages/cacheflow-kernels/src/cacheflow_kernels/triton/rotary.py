"""Rotary position embedding (RoFormer, arXiv:2104.09864) of q and k in one launch.

Arguments are as in `ops`, which checks them. Cosines and sines are rounded to the input's dtype, and so is every product and
sum, as models were trained: what rounds is said by conversions, because the interpreter has no bfloat16 arithmetic of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(x, out, x_row, cos, sin, NUM_HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr,
          HALF: tl.constexpr, PADDED_HALF: tl.constexpr, PADDED_REST: tl.constexpr, IS_NEOX: tl.constexpr):  # fmt: skip
    """One token's heads."""
    token = tl.program_id(0).to(tl.int64)
    dtype = out.dtype.element_ty
    head = tl.arange(0, PADDED_HEADS)[:, None]
    pair = tl.arange(0, PADDED_HALF)[None, :]
    inside = (head < NUM_HEADS) & (pair < HALF)
    first = head * HEAD_SIZE + (pair if IS_NEOX else 2 * pair)
    second = first + (HALF if IS_NEOX else 1)
    a = tl.load(x + token * x_row + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + token * x_row + second, mask=inside, other=0.0).to(tl.float32)
    a_cos, a_sin = (a * cos).to(dtype).to(tl.float32), (a * sin).to(dtype).to(tl.float32)
    b_cos, b_sin = (b * cos).to(dtype).to(tl.float32), (b * sin).to(dtype).to(tl.float32)
    to = out + token * NUM_HEADS * HEAD_SIZE
    tl.store(to + first, (a_cos - b_sin).to(dtype), mask=inside)
    tl.store(to + second, (b_cos + a_sin).to(dtype), mask=inside)
    if 2 * HALF < HEAD_SIZE:
        rest = 2 * HALF + tl.arange(0, PADDED_REST)[None, :]
        still = (head < NUM_HEADS) & (rest < HEAD_SIZE)
        value = tl.load(x + token * x_row + head * HEAD_SIZE + rest, mask=still)
        tl.store(to + head * HEAD_SIZE + rest, value, mask=still)


@triton.jit
def _rotary(
    q,
    k,
    q_out,
    k_out,
    positions,
    cos_sin,
    q_row,
    k_row,
    cos_sin_row,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    PADDED_Q_HEADS: tl.constexpr,
    PADDED_K_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
    IS_NEOX: tl.constexpr,
):
    dtype = q_out.dtype.element_ty
    pair = tl.arange(0, PADDED_HALF)[None, :]
    angle = cos_sin + tl.load(positions + tl.program_id(0)) * cos_sin_row + pair
    cos = tl.load(angle, mask=pair < HALF, other=0.0).to(dtype).to(tl.float32)
    sin = tl.load(angle + HALF, mask=pair < HALF, other=0.0).to(dtype).to(tl.float32)
    _turn(q, q_out, q_row, cos, sin, Q_HEADS, PADDED_Q_HEADS, HEAD_SIZE, HALF, PADDED_HALF, PADDED_REST, IS_NEOX)
    _turn(k, k_out, k_row, cos, sin, K_HEADS, PADDED_K_HEADS, HEAD_SIZE, HALF, PADDED_HALF, PADDED_REST, IS_NEOX)


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, head_size: int, is_neox: bool) -> tuple[Tensor, Tensor]:
    """New tensors with q and k, turned."""
    num_tokens = q.shape[0]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if num_tokens == 0:
        return q_out, k_out
    q_heads, k_heads, half = q.shape[1] // head_size, k.shape[1] // head_size, cos_sin.shape[1] // 2
    _rotary[(num_tokens,)](
        q,
        k,
        q_out,
        k_out,
        positions,
        cos_sin,
        q.stride(0),
        k.stride(0),
        cos_sin.stride(0),
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        PADDED_Q_HEADS=triton.next_power_of_2(q_heads),
        PADDED_K_HEADS=triton.next_power_of_2(k_heads),
        HEAD_SIZE=head_size,
        HALF=half,
        PADDED_HALF=triton.next_power_of_2(half),
        PADDED_REST=triton.next_power_of_2(max(1, head_size - 2 * half)),
        IS_NEOX=is_neox,
    )
    return q_out, k_out
