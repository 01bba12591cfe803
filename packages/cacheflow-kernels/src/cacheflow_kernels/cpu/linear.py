"""Packed matrix products on the CPU: lays a weight out in panels for linear.cpp, once, and calls it.

It knows the layout (linear.h); how weights are quantised is defined in `reference`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from cacheflow_kernels import reference
from cacheflow_kernels.cpu import library, weight_memory

DTYPES = (torch.float32, torch.bfloat16)
"""Of activations, results and plain weights."""

_PANEL = 32
_STRIP = 16
_ITEMS = 16
_PLAIN_FORMS = {torch.float32: 0, torch.bfloat16: 1}
_INT8, _INT4, _INT8_DYNAMIC = 2, 3, 4


class _Linear(ctypes.Structure):
    """`Linear` of linear.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("minimums", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("num_panels", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("form", ctypes.c_int32),
        ("is_bfloat16", ctypes.c_int32),
        ("is_gated", ctypes.c_int32),
    )


def supports(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Why these products can't be had there."""
    return library.check_cpu(device) + (() if dtype in DTYPES else (f"{dtype} is neither float32 nor bfloat16",))


def linear(
    weight: Tensor, bias: Tensor | None, form: str, group_size: int, is_gated: bool, dtype: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    """As `ops.linear`. Only the packed weight is kept, and the result is called from any thread.

    `dtype` is that of activations and results; None: the weight's. A plain weight has it too.
    """
    dtype = dtype or weight.dtype
    assert form != "plain" or weight.dtype == dtype, f"a plain weight of {weight.dtype} for {dtype} activations"
    num_rows, in_features = weight.shape
    out_features = num_rows // 2 if is_gated else num_rows
    scales: Tensor | None = None
    minimums: Tensor | None = None
    sums: Tensor | None = None
    if form == "plain":
        code = _PLAIN_FORMS[dtype]
        packed = _interleave(_panels(weight, is_gated), 1 if dtype == torch.float32 else 2)
    elif form == "int8_dynamic":
        code = _INT8_DYNAMIC
        whole, row_scales = reference.quantise_rows(reference.rotate_blocks(weight))
        scales = _panels(row_scales, is_gated)
        sums = _panels(whole.sum(dim=1, dtype=torch.int32), is_gated)
        packed = _interleave(_panels(whole, is_gated), 4)
    else:
        code = _INT8 if form == "int8" else _INT4
        whole, group_scales, group_minimums = reference.quantise_groups(weight, 8 if form == "int8" else 4, group_size)
        strips = _padded(_panels(whole, is_gated), 2, 2 * _ITEMS).unflatten(1, (2, _STRIP))
        num_groups = -(-strips.shape[3] // group_size)
        scales = _by_strip(group_scales, is_gated, num_groups)
        if group_minimums is None:
            packed = strips.transpose(2, 3)
        else:
            minimums = _by_strip(group_minimums, is_gated, num_groups)
            eights = strips.to(torch.int32).unflatten(3, (-1, 4, 2)).transpose(2, 3)
            packed = (eights << torch.tensor([[0, 16], [4, 20], [8, 24], [12, 28]], dtype=torch.int32)).sum(
                (4, 5), dtype=torch.int32
            )
    offsets = None if bias is None else _panels(bias.float(), is_gated)
    parts = (packed, scales, minimums, sums, offsets)
    owned = tuple(None if part is None else weight_memory.place(part) for part in parts)
    description = _Linear(
        *(None if tensor is None else tensor.data_ptr() for tensor in owned),
        num_panels=packed.shape[0],
        in_features=in_features,
        out_features=out_features,
        group_size=group_size,
        form=code,
        is_bfloat16=dtype == torch.bfloat16,
        is_gated=is_gated,
    )
    return _product(description, owned, dtype, in_features, out_features)


def _product(
    description: _Linear, owned: tuple[Tensor | None, ...], dtype: torch.dtype, in_features: int, out_features: int
) -> Callable[[Tensor], Tensor]:
    """The function that multiplies; it keeps alive what the description points to."""
    loaded = library.load()
    assert loaded is not None, "supports() was not asked"
    call = loaded.cf_linear
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, *(ctypes.c_int64,) * 2, ctypes.c_void_p, ctypes.c_int64)
    call.restype = None
    address = ctypes.addressof(description)
    num_threads = torch.get_num_threads

    def multiply(x: Tensor) -> Tensor:
        shape = x.shape
        if len(shape) != 2 or shape[1] != in_features or x.dtype is not dtype or not x.is_cpu:
            raise ValueError(f"x must be [num_rows, {in_features}] {dtype} on cpu, got {list(shape)} {x.dtype} on {x.device}.")
        stride, stride_within = x.stride()
        if stride_within != 1 and in_features > 1:
            raise ValueError(f"x must be contiguous in its last axis, got strides {x.stride()}.")
        out = x.new_empty((shape[0], out_features))
        if shape[0]:
            call(address, x.data_ptr(), shape[0], stride, out.data_ptr(), num_threads())
        return out

    # An attribute, as a closure would let go of what it does not mention.
    multiply.owned = (description, *owned)  # type: ignore[attr-defined]
    return multiply


def _panels(rows: Tensor, is_gated: bool) -> Tensor:
    """`[out_features, ...]` → `[num_panels, 32, ...]`, padded with zeros; gated: 16 gates and their ups in each."""
    if not is_gated:
        return _padded(rows, 0, _PANEL).reshape(-1, _PANEL, *rows.shape[1:])
    halves = [_padded(half, 0, _PANEL // 2).reshape(-1, _PANEL // 2, *rows.shape[1:]) for half in rows.chunk(2)]
    return torch.cat(halves, dim=1)


def _by_strip(groups: Tensor, is_gated: bool, num_groups: int) -> Tensor:
    """`[out_features, groups]` → `[num_panels, 2, num_groups, 16]`, padded with zeros."""
    panels = _padded(_panels(groups, is_gated), 2, num_groups)
    return panels.reshape(-1, 2, _STRIP, num_groups).transpose(2, 3)


def _interleave(panels: Tensor, step: int) -> Tensor:
    """`[num_panels, 32, k]` → `[num_panels, k / step, 32, step]`, padded with zeros: a column's next k beside each other."""
    num_panels, num_columns, _ = panels.shape
    return _padded(panels, 2, step * _ITEMS).reshape(num_panels, num_columns, -1, step).transpose(1, 2)


def _padded(tensor: Tensor, axis: int, multiple: int) -> Tensor:
    missing = -tensor.shape[axis] % multiple
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = missing
    return torch.cat((tensor, tensor.new_zeros(shape)), dim=axis)
