"""The operations under torch.compile, on tensors without data, and by torch's own checks of a registered operation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode

import cacheflow_kernels as kernels

Inputs = dict[str, torch.Tensor]


def inputs(device: str = "cpu") -> Inputs:
    """Three tokens of one sequence, two heads of 32, one block of 16."""
    generator = None if device == "meta" else torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(3, 64, generator=generator, device=device),
        "weight": torch.randn(64, generator=generator, device=device),
        "positions": torch.arange(3, device=device),
        "cos_sin": torch.randn(8, 32, generator=generator, device=device),
        "k_cache": torch.zeros(2, 2, 16, 32, device=device),
        "v_cache": torch.zeros(2, 2, 16, 32, device=device),
        "pairs": torch.zeros(1, 2, dtype=torch.int64, device=device),
        "block_tables": torch.zeros(1, 1, dtype=torch.int32, device=device),
        "seq_lens": torch.ones(1, dtype=torch.int32, device=device) * 3,
        "query_start_loc": torch.arange(2, dtype=torch.int32, device=device) * 3,
    }


def layer(
    x: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pairs: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
) -> torch.Tensor:
    """Every operation once; what one may overwrite is not used again."""
    hidden, residual = kernels.fused_add_rms_norm(kernels.rms_norm(x, weight), x.clone(), weight)
    q, k = kernels.rotary(hidden.clone(), kernels.layer_norm(residual, weight), positions, cos_sin, 32)
    kernels.store_kv(k.view(3, 2, 32), hidden.view(3, 2, 32), k_cache, v_cache, positions)
    kernels.copy_blocks([k_cache, v_cache], pairs)
    kernels.swap_blocks(k_cache, v_cache, pairs)
    attended = kernels.paged_attention(q.view(3, 2, 32), k_cache, v_cache, block_tables, seq_lens, query_start_loc, window=2)
    values, _, normalisers = kernels.row_maxima(hidden)
    gated = kernels.silu_and_mul(attended.flatten(1)) + kernels.gelu_and_mul(hidden, approximate="tanh")
    return gated + (values - normalisers)[:, None]


def test_a_compiled_function_is_one_graph_with_the_eager_result() -> None:
    eager, compiled = inputs(), inputs()
    expected = layer(**eager)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(**compiled), expected)
    for cache in ("k_cache", "v_cache"):
        assert torch.equal(compiled[cache], eager[cache])


def test_tensors_on_the_meta_device_give_shapes() -> None:
    out = layer(**inputs("meta"))
    assert out.is_meta
    assert out.shape == (3, 32)


def test_fake_tensors_give_shapes() -> None:
    with FakeTensorMode():
        out = layer(**{name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in inputs("meta").items()})
    assert out.shape == (3, 32)
    assert out.dtype == torch.float32


CALLS: dict[str, Callable[[Inputs], tuple[object, ...]]] = {
    "rms_norm": lambda t: (t["x"], t["weight"], 1e-6),
    "layer_norm": lambda t: (t["x"], t["weight"], None, 1e-6),
    "fused_add_rms_norm": lambda t: (t["x"], t["x"].clone(), t["weight"], 1e-6),
    "rotary": lambda t: (t["x"], t["x"].clone(), t["positions"], t["cos_sin"], 32, False),
    "silu_and_mul": lambda t: (t["x"],),
    "gelu_and_mul": lambda t: (t["x"], "none"),
    "row_maxima": lambda t: (t["x"],),
    "draw_rows": lambda t: (
        *(t["x"], torch.tensor([0, 2]), torch.tensor([1.0, 0.5])),
        *(torch.tensor([0.1, 0.7], dtype=torch.float64), torch.tensor([0, 3])),
        *(torch.tensor([0.9, 1.0], dtype=torch.float64), torch.tensor([0.0, 0.1])),
    ),
    "store_kv": lambda t: (t["x"].view(3, 2, 32), t["x"].view(3, 2, 32), t["k_cache"], t["v_cache"], t["positions"]),
    "copy_blocks": lambda t: ([t["k_cache"], t["v_cache"]], t["pairs"]),
    "swap_blocks": lambda t: (t["k_cache"], t["v_cache"], t["pairs"]),
    "paged_attention": lambda t: (
        *(t["x"].view(3, 2, 32), t["k_cache"], t["v_cache"], t["block_tables"], t["seq_lens"], t["query_start_loc"]),
        *(0.2, None, None, None),
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_torch_finds_nothing_wrong_with_the_operation(op: str) -> None:
    torch.library.opcheck(
        getattr(torch.ops.cacheflow, op).default,
        CALLS[op](inputs()),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_an_implementation_can_be_named() -> None:
    x, weight = torch.randn(3, 64), torch.randn(64)
    out = torch.ops.cacheflow.rms_norm(x, weight, 1e-6, implementation="reference")
    assert torch.equal(out, kernels.rms_norm(x, weight, implementation="reference"))
