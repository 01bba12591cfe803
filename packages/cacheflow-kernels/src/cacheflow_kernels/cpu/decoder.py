"""Calls of decoder.cpp: a Llama-shaped decoder in one call.

Where attention is not of this package it is one call between two attention calls. It knows packed products by what `linear`
made of them, and a step's attention by its `Plan`; it does not know where weights come from.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cacheflow_kernels.cpu import library, rows
from cacheflow_kernels.cpu.attention import DTYPES, INTEGER, POINTER, Layer, Plan, cache_of

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class _Layer(ctypes.Structure):
    """`DecoderLayer` of decoder.cpp."""

    _fields_ = tuple((name, POINTER) for name in ("attention_norm", "mlp_norm", "qkv", "out", "gate_up", "down"))


class _Decoder(ctypes.Structure):
    """`Decoder` of decoder.cpp."""

    _fields_ = (
        ("norm", POINTER),
        ("cos_sin", POINTER),
        *((name, INTEGER) for name in ("num_heads", "num_kv_heads", "head_size", "rotary_size", "hidden_size")),
        ("eps", ctypes.c_float),
        ("is_neox", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class _Step(ctypes.Structure):
    """`DecoderStep` of decoder.cpp."""

    _fields_ = (
        *((name, POINTER) for name in ("x", "residual", "qkv", "inner", "positions")),
        ("num_rows", INTEGER),
        ("num_threads", INTEGER),
    )


class _Attention(ctypes.Structure):
    """`DecoderAttention` of decoder.cpp."""

    _fields_ = (
        *((name, POINTER) for name in ("batch", "slots", "layers", "keys", "values")),
        ("block_stride", INTEGER),
        ("out", POINTER),
    )


class _Caches:
    """Addresses of what an engine's steps share: each layer's particulars, keys and values.

    Args:
        kv: The cache tensors by their layers' numbers; the list is the same one in all steps, with the same tensors.
        layers: The particulars, likewise.
        numbers: Of the layers.
    """

    def __init__(self, kv: Sequence[Tensor], layers: Mapping[int, Layer], numbers: Sequence[int]) -> None:
        self.kv, self.layers = kv, layers
        caches, addressed = [cache_of(kv[number]) for number in numbers], POINTER * len(numbers)
        self._arrays = (
            addressed(*(ctypes.addressof(layers[number]) for number in numbers)),
            addressed(*(cache.k for cache in caches)),
            addressed(*(cache.v for cache in caches)),
        )
        self.addresses = tuple(ctypes.addressof(array) for array in self._arrays)
        self.block_stride = caches[0].block_stride


def decoder(layers: Sequence[Any], norm: Tensor, eps: float, rotary: Any) -> Callable[[Tensor, Tensor, Attend], Tensor] | None:
    """The function that runs `layers`, whose products are of `linear`; None where one of them is not.

    Args:
        layers: As the engine's `DecoderLayer`.
        norm: The weight of the norm behind the last layer.
        eps: Of all norms.
        rotary: Has `cos_sin`, `head_size` and `is_neox`.
    """
    products = [(layer.qkv, layer.out, layer.gate_up, layer.down) for layer in layers]
    if not all(hasattr(product, "owned") for four in products for product in four):
        return None
    if rotary.cos_sin.shape[1] > rows.MAX_ROTARY_SIZE:
        return None
    loaded = library.load()
    assert loaded is not None, "supports() was not asked"
    call = loaded.cf_decoder
    call.argtypes = (POINTER, POINTER, POINTER, POINTER, INTEGER, POINTER)
    call.restype = None
    call_whole = loaded.cf_whole_decoder
    call_whole.argtypes = (POINTER, POINTER, POINTER, INTEGER, POINTER)
    call_whole.restype = None

    norms = [(layer.attention_norm.contiguous(), layer.mlp_norm.contiguous()) for layer in layers]
    packed = (_Layer * len(layers))(
        *(
            _Layer(*(weight.data_ptr() for weight in two), *(ctypes.addressof(product.owned[0]) for product in four))
            for two, four in zip(norms, products, strict=True)
        )
    )
    norm, cos_sin = norm.contiguous(), rotary.cos_sin.float().contiguous()
    head_size, dtype, qkv, down = rotary.head_size, norm.dtype, products[0][0].owned[0], products[0][3].owned[0]
    sizes = layers[0].sizes
    description = _Decoder(
        norm.data_ptr(),
        cos_sin.data_ptr(),
        sizes[0] // head_size,
        sizes[1] // head_size,
        head_size,
        cos_sin.shape[1],
        qkv.in_features,
        eps,
        rotary.is_neox,
        DTYPES[dtype],
    )
    owned = (packed, norms, products, norm, cos_sin, description)
    numbers = [layer.number for layer in layers]
    addresses = [ctypes.addressof(layer) for layer in packed]
    whole = ctypes.addressof(description)

    caches: _Caches | None = None

    def run(hidden: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        nonlocal caches
        hidden = hidden.contiguous()
        num_rows = hidden.shape[0]
        x = hidden.new_empty(hidden.shape)
        # One piece of memory for what is forgotten behind a layer: queries, keys and values, the MLP, what attention gives.
        widths = sum(sizes), down.in_features, sizes[0]
        memory = hidden.new_empty(num_rows * sum(widths))
        fused, inner, out = (memory.data_ptr() + num_rows * sum(widths[:i]) * memory.itemsize for i in range(len(widths)))
        step = _Step(x.data_ptr(), hidden.data_ptr(), fused, inner, positions.data_ptr(), num_rows, torch.get_num_threads())
        plan = getattr(attend, "plan", None)
        if isinstance(plan, Plan):
            kv: Sequence[Tensor] = attend.kv  # type: ignore[attr-defined]
            if caches is None or caches.kv is not kv or caches.layers is not plan.layers:
                caches = _Caches(kv, plan.layers, numbers)
            attention = _Attention(
                ctypes.addressof(plan.batch), plan.slot_mapping.data_ptr(), *caches.addresses, caches.block_stride, out
            )
            call_whole(whole, ctypes.addressof(step), packed, len(numbers), ctypes.addressof(attention))
            return x
        q, k, v = memory[: num_rows * widths[0]].view(num_rows, -1).split(sizes, dim=-1)
        address, done, attended, stride = ctypes.addressof(step), None, None, 0
        for number, following in zip(numbers, addresses, strict=True):
            call(whole, address, done, attended, stride, following)
            given = attend(number, q, k, v)
            if given.stride(1) != 1:
                given = given.contiguous()
            done, attended, stride = following, given.data_ptr(), given.stride(0)
        call(whole, address, done, attended, stride, None)
        return x

    run.owned = owned  # type: ignore[attr-defined]
    return run
