"""The operations beside attention on a GPU, through each implementation that can run there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cacheflow_kernels import (
    copy_blocks,
    fused_add_rms_norm,
    gelu_and_mul,
    layer_norm,
    reference,
    rms_norm,
    rotary,
    silu_and_mul,
    store_kv,
    swap_blocks,
)
from cacheflow_kernels.accuracy import LIMITS, ROW_SHAPES, relative_rms, rows
from cacheflow_kernels.ops import REGISTRY

GPU = torch.device("cuda", 0)
SHAPES = (*ROW_SHAPES, (5, 4096), (2, 14336), (1, 40000))
NAMES = ("cuda", "triton")
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def implementations(*ops: str) -> Any:
    """Each (operation's) implementation but the reference."""
    names = [name for name in NAMES if all(name in REGISTRY.reasons(op, GPU, torch.float16) for op in ops)]
    return pytest.mark.parametrize("name", names)


@shapes
@DTYPES
@implementations("rms_norm", "fused_add_rms_norm")
def test_rms_norm(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for wide in rows(shape, device=str(GPU)):
        x, weight = wide.to(dtype), (1 + torch.rand(shape[-1], device=GPU)).to(dtype)
        residual = torch.randn(shape, device=GPU).to(dtype)
        expected = reference.rms_norm(x.double(), weight.double(), 1e-6)
        assert relative_rms(rms_norm(x, weight, implementation=name), expected) <= LIMITS[dtype]
        added = x + residual
        out, total = fused_add_rms_norm(x, residual, weight, implementation=name)
        assert torch.equal(total, added)
        assert relative_rms(out, reference.rms_norm(added.double(), weight.double(), 1e-6)) <= LIMITS[dtype]


@shapes
@DTYPES
@implementations("layer_norm")
def test_layer_norm(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for wide in rows(shape, device=str(GPU)):
        x, weight, bias = wide.to(dtype), *(torch.randn(2, shape[-1], device=GPU).to(dtype))
        expected = reference.layer_norm(x.double(), weight.double(), bias.double(), 1e-5)
        assert relative_rms(layer_norm(x, weight, bias, implementation=name), expected) <= LIMITS[dtype]


@shapes
@DTYPES
@implementations("silu_and_mul", "gelu_and_mul")
def test_gated_products(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for wide in rows(shape, device=str(GPU)):
        x = wide.to(dtype)
        assert relative_rms(silu_and_mul(x, implementation=name), reference.silu_and_mul(x.double())) <= LIMITS[dtype]
        for approximate in ("none", "tanh"):
            out = gelu_and_mul(x, approximate=approximate, implementation=name)
            assert relative_rms(out, reference.gelu_and_mul(x.double(), approximate)) <= LIMITS[dtype]


@pytest.mark.parametrize(("rotary_size", "is_neox"), [(64, True), (64, False), (32, True), (20, False)])
@DTYPES
@implementations("rotary")
def test_rotary(name: str, dtype: torch.dtype, rotary_size: int, is_neox: bool) -> None:
    qkv = torch.randn(37, 10 * 64, dtype=torch.float64, device=GPU).to(dtype)
    q, k = qkv[:, : 6 * 64], qkv[:, 6 * 64 : 8 * 64]
    angles = torch.arange(1000, device=GPU)[:, None] / 10 ** torch.linspace(0, 3, rotary_size // 2, device=GPU)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.randint(1000, (37,), device=GPU)
    expected = reference.rotary(q.double(), k.double(), positions, cos_sin.double(), 64, is_neox)
    out = rotary(q, k, positions, cos_sin, 64, is_neox, implementation=name)
    for found, wanted in zip(out, expected, strict=True):
        assert relative_rms(found, wanted) <= LIMITS[dtype]


@implementations("rms_norm", "fused_add_rms_norm", "silu_and_mul")
def test_a_row_gets_the_same_bits_whatever_else_is_in_the_batch(name: str) -> None:
    x = torch.randn(50, 4096, device=GPU).bfloat16()
    weight = torch.randn(4096, device=GPU).bfloat16()
    together, gated = rms_norm(x, weight, implementation=name), silu_and_mul(x, implementation=name)
    for i in (0, 17, 49):
        row = x[i : i + 1]
        assert torch.equal(rms_norm(row, weight, implementation=name), together[i : i + 1])
        assert torch.equal(silu_and_mul(row, implementation=name), gated[i : i + 1])


@pytest.mark.parametrize("head_size", [20, 64, 128])
@DTYPES
@implementations("store_kv")
def test_stored_rows_arrive_at_their_slots_and_nowhere_else(name: str, dtype: torch.dtype, head_size: int) -> None:
    qkv = torch.randn(100, 12, head_size, device=GPU).to(dtype)
    k, v = qkv[:, 4:8], qkv[:, 8:]
    slots = torch.randperm(20 * 16, device=GPU)[:100]
    slots[[3, 50]] = -1
    both = torch.zeros(20, 2, 4, 16, head_size, dtype=dtype, device=GPU)
    expected = torch.zeros_like(both)
    store_kv(k, v, both[:, 0], both[:, 1], slots, implementation=name)
    store_kv(k, v, expected[:, 0], expected[:, 1], slots, implementation="reference")
    assert torch.equal(both, expected)


@pytest.mark.parametrize("pairs", [[(0, 3), (1, 2)], [(0, 1), (1, 2)], []], ids=["apart", "a chain", "none"])
@implementations("copy_blocks")
def test_copied_blocks_are_read_before_any_is_written(name: str, pairs: list[tuple[int, int]]) -> None:
    tensor = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    caches = [torch.randn(4, 2, 8, device=GPU) for _ in range(130)]
    expected = [cache.clone() for cache in caches]
    copy_blocks(caches, tensor, implementation=name)
    copy_blocks(expected, tensor, implementation="reference")
    assert all(torch.equal(*both) for both in zip(caches, expected, strict=True))


@pytest.mark.parametrize("is_pinned", [False, True])
def test_blocks_go_to_the_host_and_come_back(is_pinned: bool) -> None:
    cache = torch.randn(8, 2, 16, 64, device=GPU).half()
    host = torch.zeros(9, 2, 16, 64, pin_memory=is_pinned, dtype=torch.float16)
    swap_blocks(cache, host, torch.tensor([[3, 0], [4, 1], [5, 2], [0, 7]]), implementation="cuda")
    assert torch.equal(host[[0, 1, 2, 7]], cache[[3, 4, 5, 0]].cpu())
    other = torch.zeros_like(cache)
    swap_blocks(host, other, torch.tensor([[7, 1], [0, 6]]), implementation="cuda")
    assert torch.equal(other[[1, 6]], cache[[0, 3]])
