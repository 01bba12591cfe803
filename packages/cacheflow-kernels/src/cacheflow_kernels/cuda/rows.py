"""Normalisation, rotary embedding and gated products, row by row. Arguments are as in `ops`, which checks them."""

from __future__ import annotations

import torch
from torch import Tensor

from cacheflow_kernels.cuda import library
from cacheflow_kernels.cuda.library import INTEGER, LONG, POINTER, REAL

_rms_norm = library.function("rms_norm", *[POINTER] * 4, LONG, LONG, INTEGER, INTEGER, REAL, INTEGER)
_rotary = library.function("rotary", *[POINTER] * 4, *[LONG] * 3, *[INTEGER] * 7)
_activate_and_mul = library.function("activate_and_mul", POINTER, POINTER, LONG, *[INTEGER] * 4)
_ACTIVATIONS = {"silu": 0, "none": 1, "tanh": 2}
"""SiLU, and the two forms of GELU under the names of `ops.gelu_and_mul`, as silu_and_mul.cu numbers them."""


def reasons(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Why these operations can't run there."""
    found = library.check_device(device)
    if dtype not in library.DTYPES:
        found = (*found, f"{dtype} is not one of {', '.join(map(str, library.DTYPES))}")
    return found


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm: computed in float32, rounded to x's dtype, then times the weight."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm(_as_rows(x), None, weight, eps, out)
    return out


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum, which replaces `residual`, and its RMSNorm."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = residual if residual.is_contiguous() else residual.contiguous()
    _norm(_as_rows(x), _as_rows(total), weight, eps, out)
    return out, total


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    weight = weight.to(x.dtype)
    _rms_norm(
        x,
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        *x.shape,
        eps,
        library.DTYPES[x.dtype],
    )


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, head_size: int, is_neox: bool) -> tuple[Tensor, Tensor]:
    """Turns q and k in place."""
    library.require(k.dtype == q.dtype, "k", f"{q.dtype} like q", k)
    library.require(cos_sin.dtype == torch.float32 and cos_sin.stride(1) == 1, "cos_sin", "float32 with whole rows", cos_sin)
    for name, x in (("q", q), ("k", k)):
        library.require(x.stride(1) == 1, name, "contiguous in the last axis", x)
    library.require(positions.is_contiguous(), "positions", "contiguous", positions)
    _rotary(
        q,
        q.data_ptr(),
        k.data_ptr(),
        positions.data_ptr(),
        cos_sin.data_ptr(),
        q.stride(0),
        k.stride(0),
        cos_sin.stride(0),
        q.shape[0],
        q.shape[1] // head_size,
        k.shape[1] // head_size,
        head_size,
        cos_sin.shape[1] // 2,
        is_neox,
        library.DTYPES[q.dtype],
    )
    return q, k


def silu_and_mul(x: Tensor) -> Tensor:
    """`silu(first half) * second half`."""
    return _activate(x, "silu")


def gelu_and_mul(x: Tensor, approximate: str) -> Tensor:
    """`gelu(first half) * second half`."""
    return _activate(x, approximate)


def _activate(x: Tensor, activation: str) -> Tensor:
    size = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], size, dtype=x.dtype, device=x.device)
    rows = _as_rows(x)
    _activate_and_mul(
        x,
        rows.data_ptr(),
        out.data_ptr(),
        rows.stride(0),
        rows.shape[0],
        size,
        _ACTIVATIONS[activation],
        library.DTYPES[x.dtype],
    )
    return out


def _as_rows(x: Tensor) -> Tensor:
    """`[num_rows, size]`, of any stride between rows; a copy where leading axes don't allow that or the last one is strided."""
    return x.reshape(-1, x.shape[-1]) if x.stride(-1) == 1 else x.contiguous().view(-1, x.shape[-1])
