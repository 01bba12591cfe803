"""Launches each CUDA kernel on small cases and compares with the reference: what `gpu.sh` runs under compute-sanitizer."""

from __future__ import annotations

import torch
from torch import Tensor

from cacheflow_kernels import reference
from cacheflow_kernels.accuracy import LIMITS, PagedCase, paged_inputs, relative_rms
from cacheflow_kernels.cuda import attention, blocks, rows

GPU = torch.device("cuda", 0)
DTYPE = torch.bfloat16


def check(name: str, found: Tensor, expected: Tensor) -> None:
    """Prints the error and refuses one above the limit.

    Raises:
        SystemExit: It is above.
    """
    error = relative_rms(found, expected)
    print(f"{name}: relative error {error:.1e}")
    if not error <= LIMITS[DTYPE]:
        raise SystemExit(f"{name}: the error is above {LIMITS[DTYPE]:.0e}")


def decode(head_size: int, block_size: int) -> None:
    """One split, two splits, and a window over two."""
    for window in (None, 550):
        case = PagedCase(
            name="", query_lens=(1, 1), context_lens=(40, 600), num_heads=10, head_size=head_size, block_size=block_size
        )
        inputs = paged_inputs(case, device=str(GPU)).to(DTYPE)
        out = torch.full_like(inputs.q, float("nan"))
        workspace = attention.Workspace.make(2, case.num_heads, head_size, 601, GPU)
        tensors = (inputs.q, inputs.k_cache, inputs.v_cache, inputs.block_tables, inputs.seq_lens, inputs.query_start_loc)
        attention.paged_decode(*tensors, out, head_size**-0.5, window, None, None, workspace)
        wide = inputs.to(torch.float64)
        expected = reference.paged_attention(wide.q, wide.k_cache, wide.v_cache, *tensors[3:], head_size**-0.5, window)
        check(f"paged_decode, head size {head_size}, window {window}", out, expected)


def cache_operations() -> None:
    """`store_kv`, `copy_blocks` and `swap_blocks`."""
    k, v = torch.randn(2, 5, 2, 64, device=GPU).to(DTYPE)
    cache = torch.zeros(4, 2, 2, 16, 64, dtype=DTYPE, device=GPU)
    expected = cache.clone()
    slots = torch.tensor([3, -1, 40, 15, 16], device=GPU)
    blocks.store_kv(k, v, cache[:, 0], cache[:, 1], slots)
    reference.store_kv(k, v, expected[:, 0], expected[:, 1], slots)
    check("store_kv", cache, expected)
    pairs = torch.tensor([[0, 3]])
    blocks.copy_blocks([cache], pairs)
    reference.copy_blocks([expected], pairs)
    check("copy_blocks", cache, expected)
    host = torch.zeros(4, 2, 2, 16, 64, dtype=DTYPE)
    blocks.swap_blocks(cache, host, torch.tensor([[0, 1], [1, 2]]))
    check("swap_blocks", host[1:3], cache[:2].cpu())


def row_operations(size: int) -> None:
    """Norms, activations and rotary embedding; odd sizes take the narrow kernels."""
    x, residual = torch.randn(2, 7, size, device=GPU).to(DTYPE)
    weight = torch.randn(size, device=GPU).to(DTYPE)
    check("rms_norm", rows.rms_norm(x, weight, 1e-6), reference.rms_norm(x.double(), weight.double(), 1e-6))
    out, total = rows.fused_add_rms_norm(x, residual.clone(), weight, 1e-6)
    check("rms_norm with a residual", out, reference.rms_norm(total.double(), weight.double(), 1e-6))
    check("silu_and_mul", rows.silu_and_mul(x), reference.silu_and_mul(x.double()))
    for approximate in ("none", "tanh"):
        check("gelu_and_mul", rows.gelu_and_mul(x, approximate), reference.gelu_and_mul(x.double(), approximate))
    q, k = torch.randn(7, 256, device=GPU).to(DTYPE), torch.randn(7, 128, device=GPU).to(DTYPE)
    positions, cos_sin = torch.arange(7, device=GPU), torch.rand(9, 64, device=GPU)
    for is_neox in (True, False):
        expected = reference.rotary(q.double(), k.double(), positions, cos_sin.double(), 64, is_neox)
        found = rows.rotary(q.clone(), k.clone(), positions, cos_sin, 64, is_neox)
        for one, other in zip(found, expected, strict=True):
            check("rotary", one, other)


if __name__ == "__main__":
    torch.manual_seed(0)
    for number, each in enumerate(attention.HEAD_SIZES):
        decode(each, (8, 16, 32)[number % 3])
    cache_operations()
    for each in (130, 1024):
        row_operations(each)
    torch.cuda.synchronize()
