"""Gated activations: one half of a row, activated, times the other half. Arguments are as in `ops`, which checks them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cacheflow_kernels.triton.scores import tanh

_CHUNK = 1024
"""Elements of a row that one program computes: 8 a thread. Not measured."""


@triton.jit
def _activate_and_mul(x, out, x_row, SIZE: tl.constexpr, CHUNK: tl.constexpr, ACTIVATION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = element < SIZE
    gate = tl.load(x + row * x_row + element, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_row + SIZE + element, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu_tanh":
        active = 0.5 * gate * (1.0 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    else:
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + row * SIZE + element, (active * up).to(out.dtype.element_ty), mask=inside)


def silu_and_mul(x: Tensor) -> Tensor:
    """`silu(first half) * second half`."""
    return _launch(x, "silu")


def gelu_and_mul(x: Tensor, approximate: str) -> Tensor:
    """`gelu(first half) * second half`."""
    return _launch(x, "gelu_tanh" if approximate == "tanh" else "gelu")


def _launch(x: Tensor, activation: str) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    num_rows, size = rows.shape[0], rows.shape[1] // 2
    out = torch.empty(*x.shape[:-1], size, dtype=x.dtype, device=x.device)
    if num_rows:
        grid = (num_rows, triton.cdiv(size, _CHUNK))
        _activate_and_mul[grid](rows, out, rows.stride(0), SIZE=size, CHUNK=_CHUNK, ACTIVATION=activation)
    return out
