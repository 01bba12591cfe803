"""RMSNorm and LayerNorm, one program a row. Arguments are as in `ops`, which checks them.

Sums are in float32. RMSNorm rounds to the input's dtype before it multiplies by the weight, as models were trained.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(
    x, residual, weight, out, total, x_row, residual_row, eps, SIZE: tl.constexpr, PADDED: tl.constexpr, IS_FUSED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, PADDED)
    inside = element < SIZE
    dtype = out.dtype.element_ty
    wide = tl.load(x + row * x_row + element, mask=inside, other=0.0).to(tl.float32)
    if IS_FUSED:
        wide += tl.load(residual + row * residual_row + element, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(dtype)
        tl.store(total + row * SIZE + element, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / SIZE + eps)
    normal = (wide * inverse).to(dtype).to(tl.float32)
    scale = tl.load(weight + element, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + element, (normal * scale).to(dtype), mask=inside)


@triton.jit
def _layer_norm(x, weight, bias, out, x_row, eps, SIZE: tl.constexpr, PADDED: tl.constexpr, HAS_BIAS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, PADDED)
    inside = element < SIZE
    wide = tl.load(x + row * x_row + element, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, wide - tl.sum(wide, axis=0) / SIZE, 0.0)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=0) / SIZE + eps)
    result = centred * inverse * tl.load(weight + element, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        result += tl.load(bias + element, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + element, result.to(out.dtype.element_ty), mask=inside)


def num_warps(size: int) -> int:
    """Warps for a row: some 16 elements a thread, between 1 and 16 warps. Not measured."""
    return min(16, max(1, int(triton.next_power_of_2(size)) // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm into a new tensor."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(rows, None, weight, out, None, eps)
    return out


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its RMSNorm in one pass over both inputs, into new tensors."""
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch_rms_norm(x.reshape(-1, x.shape[-1]), residual.reshape(-1, x.shape[-1]), weight, out, total, eps)
    return out, total


def _launch_rms_norm(
    rows: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, total: Tensor | None, eps: float
) -> None:
    num_rows, size = rows.shape
    if num_rows == 0:
        return
    _rms_norm[(num_rows,)](
        rows,
        residual,
        weight,
        out,
        total,
        rows.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        SIZE=size,
        PADDED=triton.next_power_of_2(size),
        IS_FUSED=residual is not None,
        num_warps=num_warps(size),
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm into a new tensor; the variance is taken of centred values, so that a large mean costs no precision."""
    rows = x.reshape(-1, x.shape[-1])
    num_rows, size = rows.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_rows:
        _layer_norm[(num_rows,)](
            rows,
            weight,
            bias,
            out,
            rows.stride(0),
            eps,
            SIZE=size,
            PADDED=triton.next_power_of_2(size),
            HAS_BIAS=bias is not None,
            num_warps=num_warps(size),
        )
    return out
