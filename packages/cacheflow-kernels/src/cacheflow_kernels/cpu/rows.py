"""Calls of the C++ kernels on rows: norms, rotary embedding, gated activations.

Arguments are as in `reference`. They are checked by `ops` or right by the engine's contract; what is looked at here is only
the memory's layout. It knows neither the registry nor the engine.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from cacheflow_kernels.cpu import library
from cacheflow_kernels.cpu.attention import DTYPES, INTEGER, POINTER

MAX_ROTARY_SIZE = 1024
ACTIVATIONS = {"silu": 0, "none": 1, "tanh": 2}
"""`Activation` of silu_and_mul.cpp, by name: the two kinds of gelu are called as in torch."""


@cache
def _kernels() -> ctypes.CDLL:
    loaded = library.load()
    assert loaded is not None, "called where library.reasons() says why not"
    eps, dtype = ctypes.c_float, ctypes.c_int32
    loaded.cf_rms_norm.argtypes = (POINTER, INTEGER, POINTER, POINTER, INTEGER, INTEGER, eps, dtype)
    loaded.cf_fused_add_rms_norm.argtypes = (*(POINTER, INTEGER) * 2, POINTER, INTEGER, INTEGER, eps, dtype)
    loaded.cf_layer_norm.argtypes = (POINTER, INTEGER, POINTER, POINTER, POINTER, INTEGER, INTEGER, eps, dtype)
    loaded.cf_rotary.argtypes = (*(POINTER, INTEGER, INTEGER) * 2, POINTER, POINTER, *(INTEGER,) * 3, ctypes.c_int32, dtype)
    loaded.cf_activate_and_mul.argtypes = (POINTER, INTEGER, POINTER, INTEGER, INTEGER, ctypes.c_int32, dtype)
    loaded.cf_row_maxima.argtypes = (POINTER, INTEGER, *(POINTER,) * 3, INTEGER, INTEGER, dtype)
    loaded.cf_draw_rows.argtypes = (POINTER, INTEGER, *(POINTER,) * 8, INTEGER, INTEGER, dtype)
    for name in ("rms_norm", "fused_add_rms_norm", "layer_norm", "rotary", "activate_and_mul", "row_maxima", "draw_rows"):
        getattr(loaded, f"cf_{name}").restype = None
    return loaded


def _as_rows(x: Tensor) -> Tensor:
    """`x` as `[num_rows, size]`, contiguous in the last axis; a view wherever that can be had."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _as_row(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` contiguous in a dtype: itself, as a rule, for which two calls of torch would take a microsecond."""
    return weight if weight.dtype is dtype and weight.is_contiguous() else weight.to(dtype).contiguous()


def _empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor of x's shape and dtype; `torch.empty` takes a microsecond longer."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm, rounded to x's dtype before it is scaled."""
    rows, weight = _as_rows(x), _as_row(weight, x.dtype)
    num_rows, size = rows.shape
    out = _empty_like(x)
    _kernels().cf_rms_norm(
        rows.data_ptr(), rows.stride(0), weight.data_ptr(), out.data_ptr(), num_rows, size, eps, DTYPES[x.dtype]
    )
    return out


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of the sum, and the sum: they take the inputs' memory where rows lie in it one by one."""
    rows, totals, weight = _as_rows(x), _as_rows(residual), _as_row(weight, x.dtype)
    num_rows, size = rows.shape
    _kernels().cf_fused_add_rms_norm(
        rows.data_ptr(),
        rows.stride(0),
        totals.data_ptr(),
        totals.stride(0),
        weight.data_ptr(),
        num_rows,
        size,
        eps,
        DTYPES[x.dtype],
    )
    return rows.view(x.shape), totals.view(x.shape)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm, rounded once."""
    rows, weight = _as_rows(x), _as_row(weight, x.dtype)
    bias = None if bias is None else _as_row(bias, x.dtype)
    num_rows, size = rows.shape
    out = _empty_like(x)
    _kernels().cf_layer_norm(
        rows.data_ptr(),
        rows.stride(0),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        num_rows,
        size,
        eps,
        DTYPES[x.dtype],
    )
    return out


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, head_size: int, is_neox: bool) -> tuple[Tensor, Tensor]:
    """Turns q and k in place where their rows' elements lie side by side.

    Raises:
        ValueError: k of another dtype than q, or more elements that turn than the kernel has room for.
    """
    if k.dtype != q.dtype:
        raise ValueError(f"k must be {q.dtype} like q, got {k.dtype}.")
    if cos_sin.shape[1] > MAX_ROTARY_SIZE:
        raise ValueError(f"cos_sin must have at most {MAX_ROTARY_SIZE} columns, got {cos_sin.shape[1]}.")
    q, k, positions = _as_rows(q), _as_rows(k), positions.contiguous()
    table = cos_sin.to(torch.float32).contiguous()
    _kernels().cf_rotary(
        q.data_ptr(),
        q.stride(0),
        q.shape[1] // head_size,
        k.data_ptr(),
        k.stride(0),
        k.shape[1] // head_size,
        positions.data_ptr(),
        table.data_ptr(),
        q.shape[0],
        head_size,
        table.shape[1],
        is_neox,
        DTYPES[q.dtype],
    )
    return q, k


def silu_and_mul(x: Tensor) -> Tensor:
    """`silu` of the first half, rounded, times the second."""
    return _activate_and_mul(x, "silu")


def gelu_and_mul(x: Tensor, approximate: str) -> Tensor:
    """`gelu` of the first half, rounded, times the second; `approximate` is "none" or "tanh"."""
    return _activate_and_mul(x, approximate)


def _activate_and_mul(x: Tensor, activation: str) -> Tensor:
    rows = _as_rows(x)
    num_rows, size = rows.shape[0], rows.shape[1] // 2
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype)
    _kernels().cf_activate_and_mul(
        rows.data_ptr(), rows.stride(0), out.data_ptr(), num_rows, size, ACTIVATIONS[activation], DTYPES[x.dtype]
    )
    return out


def row_maxima(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's largest number, its place, and the logarithm of the sum of exponentials; x is `[num_rows, size]`."""
    rows = _as_rows(x)
    num_rows, size = rows.shape
    values, normalisers = (rows.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    indices = rows.new_empty(num_rows, dtype=torch.int64)
    _kernels().cf_row_maxima(
        rows.data_ptr(),
        rows.stride(0),
        values.data_ptr(),
        indices.data_ptr(),
        normalisers.data_ptr(),
        num_rows,
        size,
        DTYPES[x.dtype],
    )
    return values, indices, normalisers


def draw_rows(
    x: Tensor,
    rows: Tensor,
    temperatures: Tensor,
    numbers: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Random places in rows of `x [num_rows, size]`, and the logarithms of their probabilities at temperature 1."""
    x = _as_rows(x)
    tokens, logprobs = torch.empty_like(rows), torch.empty_like(temperatures)
    _kernels().cf_draw_rows(
        x.data_ptr(),
        x.stride(0),
        rows.data_ptr(),
        temperatures.data_ptr(),
        numbers.data_ptr(),
        None if top_k is None else top_k.data_ptr(),
        None if top_p is None else top_p.data_ptr(),
        None if min_p is None else min_p.data_ptr(),
        tokens.data_ptr(),
        logprobs.data_ptr(),
        len(rows),
        x.shape[1],
        DTYPES[x.dtype],
    )
    return tokens, logprobs
