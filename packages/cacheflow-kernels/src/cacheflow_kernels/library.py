"""The operations as `torch.ops.cacheflow.<name>`, for torch.compile, export and tensors without data.

`ops` calls them instead of an implementation while torch traces; outside of it that would only cost time. Each has a fake,
which says the result's shape. Arguments are as in `ops`, checked there, with `implementation` as a keyword. `linear` is not
here: it packs a weight and returns a function. Nothing has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cacheflow_kernels.ops import REGISTRY

_ROW_OPS = {
    "rms_norm": "(Tensor x, Tensor weight, float eps, *, str implementation='auto') -> Tensor",
    "layer_norm": "(Tensor x, Tensor weight, Tensor? bias, float eps, *, str implementation='auto') -> Tensor",
}
_GATED_OPS = {
    "silu_and_mul": "(Tensor x, *, str implementation='auto') -> Tensor",
    "gelu_and_mul": "(Tensor x, str approximate, *, str implementation='auto') -> Tensor",
}
_PAIR_OPS = {
    "fused_add_rms_norm": (
        "(Tensor x, Tensor residual, Tensor weight, float eps, *, str implementation='auto') -> (Tensor, Tensor)"
    ),
    "rotary": (
        "(Tensor q, Tensor k, Tensor positions, Tensor cos_sin, int head_size, bool is_neox, *, str implementation='auto')"
        " -> (Tensor, Tensor)"
    ),
}
_ROW_MAXIMA = "(Tensor x, *, str implementation='auto') -> (Tensor, Tensor, Tensor)"
_DRAW_ROWS = (
    "(Tensor x, Tensor rows, Tensor temperatures, Tensor numbers, Tensor? top_k=None, Tensor? top_p=None, Tensor? min_p=None,"
    " *, str implementation='auto') -> (Tensor, Tensor)"
)
_ATTENTION_OPS = {
    "paged_attention": (
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor seq_lens, Tensor query_start_loc, float scale,"
        " int? window, Tensor? alibi_slopes, float? soft_cap, *, str implementation='auto') -> Tensor"
    ),
}
_CACHE_OPS = {
    "store_kv": (
        "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, *, str implementation='auto') -> ()",
        {"k_cache", "v_cache"},
    ),
    "copy_blocks": ("(Tensor(a!)[] caches, Tensor pairs, *, str implementation='auto') -> ()", {"caches"}),
    "swap_blocks": (
        "(Tensor source, Tensor(a!) destination, Tensor pairs, *, str implementation='auto') -> ()",
        {"destination"},
    ),
}


def _like_first(x: Tensor, *rest: Any, **options: Any) -> Tensor:
    return x.new_empty(x.shape)


def _half_of_first(x: Tensor, *rest: Any, **options: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _like_both(x: Tensor, y: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _three_of_rows(x: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    numbers = (x.new_empty(x.shape[0], dtype=dtype) for dtype in (torch.float32, torch.int64, torch.float32))
    return next(numbers), next(numbers), next(numbers)


def _draws(x: Tensor, rows: Tensor, temperatures: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), temperatures.new_empty(temperatures.shape)


def _nothing(*arguments: Any, **options: Any) -> None:
    """What an operation without results gives."""


def _calls(op: str) -> Callable[..., Any]:
    """Calls the implementation of `op` for the first argument's device and dtype."""

    def call(first: Tensor | Sequence[Tensor], *rest: Any, implementation: str = "auto") -> Any:
        tensor = first if isinstance(first, Tensor) else first[0]
        return REGISTRY.select(op, implementation, tensor.device, tensor.dtype)(first, *rest)

    return call


def _calls_on_copies(op: str) -> Callable[..., Any]:
    """Likewise, with the first two tensors copied: an implementation may overwrite them, which a traced operation must not."""
    plain = _calls(op)

    def call(x: Tensor, y: Tensor, *rest: Any, implementation: str = "auto") -> Any:
        return plain(x.clone(), y.clone(), *rest, implementation=implementation)

    return call


def _register(op: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any], mutates: set[str]) -> None:
    torch.library.custom_op(f"cacheflow::{op}", function, mutates_args=mutates, schema=schema)
    torch.library.register_fake(f"cacheflow::{op}", fake)


for _op, _schema in (_ROW_OPS | _ATTENTION_OPS).items():
    _register(_op, _schema, _calls(_op), _like_first, set())
for _op, _schema in _GATED_OPS.items():
    _register(_op, _schema, _calls(_op), _half_of_first, set())
for _op, _schema in _PAIR_OPS.items():
    _register(_op, _schema, _calls_on_copies(_op), _like_both, set())
_register("row_maxima", _ROW_MAXIMA, _calls("row_maxima"), _three_of_rows, set())
_register("draw_rows", _DRAW_ROWS, _calls("draw_rows"), _draws, set())
for _op, (_schema, _mutated) in _CACHE_OPS.items():
    _register(_op, _schema, _calls(_op), _nothing, _mutated)
